"""Shared fixtures: tiny backbones, the golden values, the command line, the seed. Nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from command_line import Cli, Result
from helpers import RECORDED, Golden, save_backbone
from safetensors.torch import load_file

from hyperadapters.cli import main

# The handler of absl, which TensorBoard and rouge-score import, closes what standard error was when absl was imported,
# which is pytest's own stream, as soon as a library configures logging while a test has another one.
with suppress(ImportError):
    from absl.logging import get_absl_handler

    get_absl_handler().python_handler.stream = sys.__stderr__

# Tiny models gain nothing from threads, and sums come out the same however busy the machine is.
torch.set_num_threads(int(os.environ.get("HYPERADAPTERS_TEST_THREADS", "1")))


def pytest_collection_finish() -> None:
    """Spare the garbage collector all that was imported, through which each training would make it go again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def bert_folder(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "bert", "bert")


@pytest.fixture
def t5_folder(tmp_path: Path) -> Path:
    return save_backbone(tmp_path / "t5", "t5")


@pytest.fixture(params=["pha_t5_relu", "pha_t5_gated"])
def golden(request: pytest.FixtureRequest) -> Golden:
    path = RECORDED / request.param
    return Golden(load_file(f"{path}.safetensors"), json.loads(Path(f"{path}.json").read_text()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Calls the command line in this process; any exception but an exit is a failure of the program."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["hyperadapters", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = (re.sub(r"\x1b\[[0-9;]*m", "", text) for text in capsys.readouterr())
        return Result(int(ended.value.code or 0), out, err)

    return call


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window, of one module, because Playwright keeps an event loop running until it ends."""
    api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("the browser tests need chromium on the path")
    with api.sync_playwright() as started:
        found = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield found
        found.close()
