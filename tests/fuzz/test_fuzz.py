"""Whatever is read from outside, only errors of the library come out, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from fuzz_targets import TARGETS
from fuzzing import AT_ONCE, fuzz_settings
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in memory if the system has such folders, because each input is written to a file."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with TemporaryDirectory(dir=memory) as name:
        monkeypatch.chdir(name)
        yield Path(name)


@pytest.mark.parametrize("name", TARGETS)
def test_only_own_errors_come_out_and_nothing_is_written(name: str, folder: Path) -> None:
    inputs, check = TARGETS[name].prepare(folder)

    @fuzz_settings(TARGETS[name].inputs)
    @given(st.lists(inputs, min_size=AT_ONCE, max_size=AT_ONCE))
    def test(values: list[object]) -> None:
        for value in values:
            check(value)

    test()
