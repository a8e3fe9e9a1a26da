"""The programs in examples/ run offline and print what they say, and the notebooks are complete and hold no output."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LINES = {
    "support_desk": r"Where is my refund\? -> (accepted|declined)\n(.* -> .*\n){2}(.*\n)*"
    r"WINNER!!.*\n  intent: \w+ \(\d\.\d\d\).*\n  spam: (spam|ham) \(.*\n  urgent: (yes|no) \(.*\n",
    "customer_classifiers": r"3 customers, \d+ KiB each; tasks in the model: 2\nbakery: (order|complaint) <- (.*\n)*"
    r"left: bakery, library\n",
    "matching_pairs": r"accuracy on other pairs: [01]\.\d\d\n(.* -> .* \([01]\.\d\d\)\n){3}",
    "t5_generation": r"capital \{'France': 'Paris', 'Japan': 'Tokyo', .*\ncurrency \{'France': 'euro', ",
    "peft_export": r"\['happy', 'unhappy', 'happy', 'unhappy'\]\nmood: PEFT continues with 'happy', .* \de[+-]\d\d\n"
    r"noun: PEFT continues with 'song', ",
    "serving": r"help: (delivery|refund)\nfilm: (good|bad)\ntasks now: help, film, urgent\nurgent: (yes|no)\n",
}
NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_a_program_runs_and_prints_what_it_should(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--fast"])
    runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert re.search(LINES[path.stem], out), out
    assert list(tmp_path.iterdir()) == []


def test_every_program_is_short() -> None:
    assert len(LINES) == 6
    for name in LINES:
        assert 30 <= len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 70, name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_code_that_compiles_and_no_output(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert notebook["cells"][0]["source"][0].startswith("# ")
    for cell in cells:
        assert (cell["outputs"], cell["execution_count"]) == ([], None)
        compile("".join(cell["source"]), path.name, "exec")


def test_there_are_two_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["first_model", "routing"]
