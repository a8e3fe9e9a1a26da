"""The fuzz tests with inputs that atheris chooses by the lines of the library that they reach.

    PYTHONPATH=tests python tests/fuzz/run_atheris.py [target [options of libFuzzer]]

Without arguments, each target gets 100,000 inputs. The first failure ends the program, with the input on the screen.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import atheris
from hypothesis import given

with atheris.instrument_imports(include=["hyperadapters", "yaml"]):
    from fuzz_targets import TARGETS


def fuzz(name: str) -> None:
    with TemporaryDirectory() as folder, TemporaryDirectory() as corpus:
        # An input of hypothesis takes many bytes, which would only grow slowly from nothing.
        for seed in range(50):
            Path(corpus, str(seed)).write_bytes(random.Random(seed).randbytes(2000))
        os.chdir(folder)
        inputs, check = TARGETS[name].prepare(Path(folder))
        options = [sys.argv[0], "-len_control=0", *sys.argv[2:], corpus]
        atheris.Setup(options, given(inputs)(check).hypothesis.fuzz_one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        fuzz(sys.argv[1])
    for target in TARGETS:
        subprocess.run([sys.executable, os.path.abspath(__file__), target, "-runs=100000"], check=True)
