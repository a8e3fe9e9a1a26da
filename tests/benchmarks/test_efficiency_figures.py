"""The tables and figures of benchmarks/efficiency, on invented rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from efficiency.document_tables import (
    NOTHING,
    differences_table,
    main_table,
    rates_table,
    replaced,
    transfer_differences,
)
from efficiency.figures import main
from efficiency.summary import columns, difference, is_main, label, pairs
from tables import MISSING, transfer_table

DOCUMENT = """# By hand

<!-- table: main -->
old
<!-- end -->

Between, by hand.

<!-- figure: ablations -->
<!-- end -->
"""


def row(arm: str, seed: int = 0, n: int | str = 100, a: float = 50.0, b: float = 60.0, **fields: Any) -> dict[str, Any]:
    return {
        "arm": arm,
        "n": n,
        "seed": seed,
        "scores": {"a": a, "b": b},
        "score": (a + b) / 2,
        "trainable_per_task": 1000,
        "bytes_per_task": 4096,
        "seconds": 12.0,
        "routing_accuracy": None,
        "device": "cpu",
        **fields,
    }


def cells(table: str, name: str) -> list[str]:
    """The cells of the first row of a Markdown table that has the name in one of them."""
    rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines())
    return next(found for found in rows if name in found)


def written(folder: Path, rows: list[dict[str, Any]]) -> dict[str, bytes]:
    """Run the command on the rows; the files it leaves in the folder of documents, by name."""
    (folder / "docs").mkdir(exist_ok=True)
    if not (folder / "docs" / "sample-efficiency.md").exists():
        (folder / "docs" / "sample-efficiency.md").write_text(DOCUMENT)
    (folder / "sample_efficiency.jsonl").write_text("".join(json.dumps(found) + "\n" for found in rows))
    main(["--results", str(folder), "--docs", str(folder / "docs")])
    return {path.name: path.read_bytes() for path in sorted((folder / "docs").rglob("*.*"))}


def test_main_table_by_hand() -> None:
    # scores 54, 56 and 58: mean 56, deviation sqrt((4 + 0 + 4) / 2) = 2
    rows = [row("pha", seed, a=48 + 2 * seed, b=60 + 2 * seed) for seed in range(3)]
    rows += [row("probe", n=32, trainable_per_task=10), row("probe", n="all", trainable_per_task=2000)]
    table = main_table(columns(rows))
    assert cells(table, "arm")[1:4] == ["n = 32", "n = 100", "all rows"]
    assert cells(table, "PHA") == ["PHA", MISSING, "56.0 ± 2.0 (3)", MISSING, "1,000", "4,096"]
    assert cells(table, "linear probe") == ["linear probe", "55.0 (1)", MISSING, "55.0 (1)", "10 to 2,000", "4,096"]


def test_fewer_tasks_are_named() -> None:
    table = main_table(columns([row("pha"), row("setfit", scores={"a": 70.0}, score=70.0)]))
    assert cells(table, "SetFit")[1] == "70.0 (1; 1 tasks)"


def test_constant_difference_has_a_constant_interval() -> None:
    ours = {(task, seed): 10.0 * seed + 1.5 for task in "abc" for seed in range(3)}
    theirs = {pair: score - 1.5 for pair, score in ours.items()}
    assert difference(ours, theirs) == pytest.approx((1.5, 1.5, 1.5, 9))


def test_difference_is_inside_its_interval_and_the_same_each_time() -> None:
    ours = {("a", seed): float(seed) for seed in range(10)}
    found = difference(ours, dict.fromkeys(ours, 0.0))
    assert found is not None
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(4.5)
    assert found == difference(ours, dict.fromkeys(ours, 0.0))


def test_pairs_that_only_one_arm_has_are_left_out() -> None:
    ours, theirs = (
        pairs([row("plus", 0), row("plus", 1, a=90.0)]),
        pairs([row("pha", 0, a=49.0, b=59.0), row("pha", 2)]),
    )
    assert difference(ours, theirs) == pytest.approx((1.0, 1.0, 1.0, 2))
    assert difference(pairs([row("plus", 1)]), theirs) is None


def test_differences_table() -> None:
    table = differences_table(columns([row("probe", a=49.0, b=59.0), row("pha"), row("plus", a=52.0, b=62.0)]))
    gains = ["-1.0 (-1.0 to -1.0)", "2", "+3.0 (+3.0 to +3.0)", "2"]
    assert cells(table, "linear probe") == ["n = 100", "linear probe", *gains]
    assert cells(table, "PHA") == ["n = 100", "PHA", MISSING, MISSING, "+2.0 (+2.0 to +2.0)", "2"]
    assert cells(table, "PHA+") == ["n = 100", "PHA+", "+2.0 (+2.0 to +2.0)", "2", MISSING, MISSING]


def test_failed_cells_are_left_out() -> None:
    failed = {"arm": "pha", "n": 100, "seed": 1, "error": "out of memory"}
    assert columns([row("pha"), failed]) == columns([row("pha")])
    assert columns([failed]) == {}


def test_devices_are_not_mixed_within_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("pha", 0), row("pha", 1, device="cuda"), row("plus", 0, device="cuda"), row("pha", 0, n=32)]
    found = columns(rows)
    assert [cell["device"] for arm in found[100].values() for cell in arm] == ["cuda", "cuda"]
    assert list(found) == [32, 100]
    assert "n = 100: 2 rows of cuda are used, and left out are 1 of cpu" in capsys.readouterr().err


def test_order_and_names_of_arms() -> None:
    rows = [row(arm) for arm in ("own_idea", "plus_no_maps", "plus", "probe")]
    assert list(columns(rows)[100]) == ["probe", "plus", "plus_no_maps", "own_idea"]
    assert [label(arm) for arm in ("pha_no_instance", "own_idea")] == ["PHA without instance", "own_idea"]


def test_controls_and_ablations_are_no_main_arms() -> None:
    rows = [row(arm) for arm in ("pha_all_layers", "pha", "pha_no_instance")]
    assert [label(arm) for arm in columns(rows)[100]] == ["PHA", "PHA (all layers)", "PHA without instance"]
    assert [arm for arm in columns(rows)[100] if is_main(arm)] == ["pha"]


def test_learning_rates() -> None:
    trial = {"arm": "pha", "n": 32, "device": "cpu"}
    trials = [{**trial, "learning_rate": rate, "validation": score} for rate, score in ((1e-3, 40), (1e-4, 45))]
    listed = ["n = 32", "PHA", "cpu", "0.0001: 45.0, 0.001: 40.0"]
    assert cells(rates_table(trials, {}), "PHA") == [*listed, MISSING]
    found = columns([row("pha", seed, n=32, learning_rate=1e-4) for seed in (0, 1)])
    assert cells(rates_table(trials, found), "PHA") == [*listed, "0.0001"]


def test_transfer() -> None:
    scores = {("a", 0, "probe"): 0.5, ("a", 1, "probe"): 0.6, ("b", 0, "probe"): 0.7, ("a", 0, "adapter"): 0.8}
    rows = [
        {"task": task, "k": 4, "seed": seed, "method": method, "score": score, "seconds": 1.0}
        for (task, seed, method), score in scores.items()
    ]
    table = transfer_table(rows)
    assert cells(table, "a") == ["4", "a", "55.0 ± 7.1", "80.0"]
    assert cells(table, "b") == ["4", "b", "70.0", MISSING]
    assert cells(table, "**mean**") == ["4", "**mean**", "**60.0**", f"**{MISSING}**"]
    assert cells(transfer_differences(rows), "**all**") == ["4", "**all**", "+30.0 (+30.0 to +30.0)", "1"]


def test_only_text_between_markers_is_replaced() -> None:
    text = replaced(DOCUMENT, {"main": "new", "ablations": "drawn"})
    assert text == DOCUMENT.replace("old\n", "\nnew\n\n").replace("ablations -->\n", "ablations -->\n\ndrawn\n\n")
    assert replaced(text, {"main": "new", "ablations": "drawn"}) == text
    with pytest.raises(ValueError, match="needs its own line"):
        replaced(DOCUMENT.replace("<!-- end -->", "", 1), {"main": "new", "ablations": "drawn"})


def test_twice_gives_the_same_files(tmp_path: Path) -> None:
    rows = [
        row(arm, seed, n, a=50.0 + seed) for arm in ("probe", "pha", "plus") for seed in (0, 1) for n in (32, "all")
    ]
    rows += [row(arm, seed) for arm in ("lora_task", "pha", "pha_no_instance") for seed in (0, 1)]
    first = written(tmp_path, rows)
    assert set(first) == {"sample-efficiency.md", "sample_efficiency.svg", "ablations.svg", "parameters.svg"}
    assert b"images/ablations.svg" in first["sample-efficiency.md"]
    assert written(tmp_path, rows) == first


def test_no_rows_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(tmp_path, [])
    assert set(found) == {"sample-efficiency.md"}
    assert found["sample-efficiency.md"].decode().count(NOTHING) == 2
    assert "ablations.svg is not written" in capsys.readouterr().err
