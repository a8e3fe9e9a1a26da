"""The command `report`: what it writes, and what it refuses without writing anything."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Cli, assert_refused
from written_runs import result_rows, run_values, write_values

import hyperadapters

pytest.importorskip("plotly", reason="reports need the extra 'report'")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_values(tmp_path / "run", run_values())


def test_a_run_becomes_a_page(cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli("report", run)
    assert (result.code, result.out, result.err) == (0, "The report is in report.html\n", "")
    assert "<title>Report on run</title>" in (tmp_path / "report.html").read_text()


def test_result_rows_become_a_page_and_figures(cli: Cli, tmp_path: Path) -> None:
    rows, figures = tmp_path / "rows.jsonl", tmp_path / "new" / "figures"
    rows.write_text("\n".join(json.dumps(row) for row in result_rows() if row["n"] == 16))
    result = cli("report", rows, "--output", tmp_path / "a.html", "--figures", figures)
    assert result.out == f"The report is in {tmp_path}/a.html; 4 figures as PNG and SVG are in {figures}/\n"
    assert "<title>Report on rows.jsonl</title>" in (tmp_path / "a.html").read_text()
    names = ("parameters-1", "scores-1-1", "tasks-1-1", "time-1")
    assert sorted(path.name for path in figures.iterdir()) == [
        f"{name}.{end}" for name in names for end in ("png", "svg")
    ]


def test_runs_are_compared(cli: Cli, run: Path, tmp_path: Path) -> None:
    other = write_values(tmp_path / "other", run_values(seed=1))
    assert cli("report", "--compare", run, other, "--output", tmp_path / "a.html").code == 0
    assert "<title>Comparison of runs</title>" in (tmp_path / "a.html").read_text()


def test_neither_torch_nor_transformers_is_loaded(run: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from hyperadapters.report.write import write_report\n"
        f"write_report([Path({str(run)!r})], Path({str(tmp_path / 'a.html')!r}))\n"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    source = str(Path(hyperadapters.__file__).parents[1])
    paths = [source, *(path for path in sys.path if path)]
    program = f"import sys; sys.path[:0] = {paths!r}\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def with_detail(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values["details.json"].update(changes)


def without(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update({name: None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("metrics.json"), "run/metrics.json: no such file; give the folder of a finished run"),
        (with_detail(format=2), "run/details.json: expected format 1, found 2; use the version that wrote it"),
        (with_detail(confusion=[[0, 3, 1]]), "expected indices of 3 tasks, found others"),
        (with_detail(prototypes=[[1.0]]), "expected prototypes and instance vectors of the same size"),
        (lambda values: values["details.json"]["tasks"][0].update(name="mood"), "found a name twice"),
        (with_detail(losses={"task": {"x": [1], "y": []}}), "expected as many values as places, found 0 and 1"),
        (with_detail(seconds={"a": "b"}), "seconds.a: expected a valid number; found 'b'"),
        (with_detail(parameters={"heads": 10**400}), "parameters.heads: expected a number less than or equal to 9"),
        (with_detail(prototypes=[[1e200], [1e200]], points=[]), "prototypes.0.0: expected a number less than or"),
        (lambda values: values["metrics.json"].update(seconds=10**400), "seconds: expected"),
        (lambda values: values["metrics.json"].update(trainable_parameters=10**400), "trainable_parameters: expected"),
        (lambda values: values["metrics.json"].pop("mean"), "mean: required, not given"),
        (
            lambda values: values["metrics.json"]["tasks"]["mood"]["test"].clear(),
            "expected accuracy, the main metric of task 'mood', for each split",
        ),
        (lambda values: values["hyperadapter.json"].update(tasks=[{}]), "tasks.0.name: required, not given"),
        (lambda values: values.update({"comparison.json": [1]}), "run/comparison.json: 1 fault"),
    ],
)
def test_files_that_are_missing_old_or_of_another_form_are_refused(
    cli: Cli, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    values = run_values()
    change(values)
    run = write_values(tmp_path / "run", values)
    result = cli("report", run, "--output", tmp_path / "a.html", "--figures", tmp_path / "figures")
    assert_refused(result, message)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    "name", ["metrics.json", "details.json", "comparison.json", "hyperadapter.json", "resolved_recipe.yaml"]
)
def test_broken_files_are_refused(cli: Cli, run: Path, tmp_path: Path, name: str) -> None:
    (run / name).write_bytes((run / name).read_bytes()[:40] + b"\xff{")
    assert_refused(cli("report", run, "--output", tmp_path / "a.html"), f"run/{name}")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "run"), "expected one run or file, found 2; add --compare to compare runs"),
        (("--compare", "run"), "--compare: expected two or more runs, found 1; give their folders"),
        (("--compare", "run", "run"), "is given twice; give different runs"),
        (
            ("--compare", "run", "other"),
            "expected runs that have the same metric of a common task on the same split, found none",
        ),
        (("gone",), "gone: expected the folder of a finished run or a result file"),
        (("gone.jsonl",), "gone.jsonl: cannot be read"),
        (("empty.jsonl",), "empty.jsonl: expected result rows, found none"),
        (
            ("wrong.jsonl",),
            "wrong.jsonl, line 2: expected a result row, as `hyperadapters sweep` writes it: 5 faults",
        ),
        (("broken.jsonl",), "broken.jsonl, line 1: expected a JSON object"),
        (("run", "--output", "a.pdf"), "a.pdf: expected a name ending in .html"),
        (("run", "--output", "gone/a.html"), "the folder"),
        (("run", "--figures", "empty.jsonl"), "empty.jsonl: expected a folder, found a file"),
    ],
)
def test_calls_that_cannot_succeed_are_refused(
    cli: Cli, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_values(tmp_path / "other", run_values(("a", "b", "c")))
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "wrong.jsonl").write_text(json.dumps(result_rows()[0]) + '\n{"suite": "main"}\n')
    (tmp_path / "broken.jsonl").write_text("{")
    before = sorted(tmp_path.rglob("*"))
    assert_refused(cli("report", *arguments), message)
    assert sorted(tmp_path.rglob("*")) == before
