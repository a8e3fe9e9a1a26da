"""Shared fixtures: folders of tiny backbones, the golden values, the seed. Nothing is downloaded."""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from helpers import RECORDED, Golden, save_backbone
from safetensors.torch import load_file

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
