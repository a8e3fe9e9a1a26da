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
    parts_table,
    rates_table,
    replaced,
    suites_table,
    tables,
)
from efficiency.figures import main
from efficiency.summary import columns, difference, is_main, label, mean_difference, pairs, parts_of_all, suites
from efficiency.transfer_tables import suite_differences, suite_table, transfer_differences
from tables import MISSING, transfer_table

DOCUMENT = """# By hand

<!-- table: scores-main -->
old
<!-- end -->

Between, by hand.

<!-- figure: ablations -->
<!-- end -->
"""


def row(arm: str, seed: int = 0, n: int | str = 100, a: float = 50.0, b: float = 60.0, **fields: Any) -> dict[str, Any]:
    return {
        "suite": "main",
        "arm": arm,
        "n": n,
        "seed": seed,
        "scores": {"a": a, "b": b},
        "score": (a + b) / 2,
        "trainable_per_task": 1000,
        "bytes_per_task": 4096,
        "seconds": 12.0,
        "routing_accuracy": None,
        "learning_rate": 1e-3,
        "trials": 5,
        "device": "cpu",
        "digest": "0123",
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
        (folder / "README.md").write_text("<!-- table: suites-32 -->\n<!-- end -->\n")
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


def test_intervals_of_a_mean_over_suites() -> None:
    first = ({("a", seed): 1.0 for seed in range(3)}, {("a", seed): 0.0 for seed in range(3)})
    second = ({("b", seed): float(seed) for seed in range(9)}, {("b", seed): 0.0 for seed in range(9)})
    # Each suite counts the same, although one has three times as many pairs.
    found = mean_difference([first, second])
    assert found is not None
    assert (found.mean, found.pairs) == (pytest.approx(2.5), 12)
    alone = difference(*second)
    assert alone is not None
    assert (found.high - found.low) == pytest.approx((alone.high - alone.low) / 2, rel=0.1)
    assert mean_difference([first, (first[0], {})]) is None


def in_suites(arm: str, *scores: float, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of an arm with a score in each of the four suites."""
    names = ("main", "fdu", "hwu64", "tweeteval")
    return [row(arm, seed, a=score, b=score, suite=suite) for suite, score in zip(names, scores, strict=True)]


def test_differences_table() -> None:
    rows = [*in_suites("probe", 49, 40, 40, 40), *in_suites("plus", 52, 44, 40, 48), row("pha"), row("plus", seed=1)]
    found = suites(rows)
    table = differences_table(found, "plus", minus_base=False)
    gains = ["+3.0 (+3.0 to +3.0; 2)", "+4.0 (+4.0 to +4.0; 2)", "+0.0 (+0.0 to +0.0; 2)", "+8.0 (+8.0 to +8.0; 2)"]
    assert cells(table, "linear probe") == ["n = 100", "linear probe", *gains, MISSING, "+3.8 (+3.8 to +3.8; 8)"]
    assert "PHA+" not in [line.split(" | ")[1] for line in table.splitlines()[2:]]
    table = differences_table(found, "pha", minus_base=True)
    assert cells(table, "linear probe")[2:] == ["-6.0 (-11.0 to -1.0; 2)", *[MISSING] * 5]


def test_suites_table() -> None:
    rows = [*in_suites("plus", 50, 60, 70, 80), *in_suites("plus", 52, 62, 72, 82, seed=1), row("pha")]
    found = suites([*rows, row("plus", 7, a=1.0, b=1.0), row("plus", n=500)])
    table = suites_table(found, [100])
    assert "n = 500" not in table
    assert cells(table, "arm")[2:] == ["main", "fdu", "hwu64", "tweeteval", "all", "mean of 4"]
    # The mean is over the seeds of all four suites.
    assert cells(table, "PHA+")[3:] == ["61.0 ± 1.4 (2)", "71.0 ± 1.4 (2)", "81.0 ± 1.4 (2)", MISSING, "66.0 ± 1.4 (2)"]
    assert cells(table, "PHA")[2:] == ["55.0 (1)", *[MISSING] * 5]


def test_scores_of_all_are_grouped_by_the_names_of_the_tasks() -> None:
    scores = {"sst2": 50.0, "cola": 60.0, "fdu_music": 70.0, "hwu64_music": 80.0, "tweeteval_stance_abortion": 90.0}
    assert parts_of_all(scores) == {"main": 55.0, "fdu": 70.0, "hwu64": 80.0, "tweeteval": 90.0}
    table = parts_table(columns([row("plus", suite="all", scores=scores)]))
    assert cells(table, "PHA+") == ["n = 100", "PHA+", "55.0", "70.0", "80.0", "90.0", "73.8"]


def test_there_is_a_table_of_each_suite() -> None:
    made = tables(suites([row("plus", suite="fdu"), row("plus", n=16, suite="all")]), [])
    assert made["scores-main"] == made["tasks-fdu-16"] == made["tasks-all-100"] == NOTHING
    assert "PHA+" in made["scores-fdu"]
    assert "PHA+" in made["tasks-fdu-100"]
    assert "PHA+" in made["costs-all"]


def test_failed_cells_are_left_out() -> None:
    failed = {"suite": "main", "arm": "pha", "n": 100, "seed": 1, "error": "out of memory"}
    assert columns([row("pha"), failed]) == columns([row("pha")])
    assert columns([failed]) == suites([failed]) == {}


def test_the_last_row_of_a_cell_counts() -> None:
    first, second = row("pha", a=10.0), row("pha", a=20.0)
    assert columns([first, row("plus"), second])[100]["pha"] == [second]


def test_searched_and_first_rates_are_not_mixed_within_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    searched, first = row("pha", trials=4), [row("pha", seed, trials=0) for seed in (0, 1)]
    without = row("probe", learning_rate=None, trials=0)
    assert columns([searched, *first, without])[100] == {"probe": [without], "pha": first}
    assert "main, n = 100: 2 rows of first rates are used, and left out are 1 of searched" in capsys.readouterr().err
    assert columns([searched, without])[100] == {"probe": [without], "pha": [searched]}


def test_rows_of_several_versions_of_the_code_are_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    columns([row("pha"), row("plus", digest="4567")])
    assert "main, n = 100: the rows were made by 2 versions of the code" in capsys.readouterr().err


def test_devices_are_not_mixed_within_a_column(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("pha", 0), row("pha", 1, device="cuda"), row("plus", 0, device="cuda"), row("pha", 0, n=32)]
    found = columns(rows)
    assert [cell["device"] for arm in found[100].values() for cell in arm] == ["cuda", "cuda"]
    assert list(found) == [32, 100]
    assert "main, n = 100: 2 rows of cuda are used, and left out are 1 of cpu" in capsys.readouterr().err


def test_order_and_names_of_arms() -> None:
    rows = [row(arm) for arm in ("own_idea", "plus_no_maps", "plus", "probe")]
    assert list(columns(rows)[100]) == ["probe", "plus", "plus_no_maps", "own_idea"]
    assert [label(arm) for arm in ("pha_no_instance", "own_idea")] == ["PHA without instance", "own_idea"]


def test_names_of_arms_whose_heads_read_texts() -> None:
    found = columns([row(arm) for arm in ("plus_no_texts", "lora_task_texts", "lora_task", "adapter_task")])[100]
    assert [label(arm) for arm in found] == [
        "LoRA, per task",
        "LoRA, per task, text heads",
        "adapter, per task",
        "PHA+ without texts",
    ]
    assert is_main("lora_task_texts")


def test_controls_and_ablations_are_no_main_arms() -> None:
    rows = [row(arm) for arm in ("pha_all_layers", "pha", "pha_no_instance")]
    assert [label(arm) for arm in columns(rows)[100]] == ["PHA", "PHA (all layers)", "PHA without instance"]
    assert [arm for arm in columns(rows)[100] if is_main(arm)] == ["pha"]


def test_learning_rates() -> None:
    trial = {"suite": "main", "arm": "pha", "n": 32, "device": "cpu"}
    trials = [{**trial, "learning_rate": rate, "validation": score} for rate, score in ((1e-3, 40), (1e-4, 45))]
    listed = ["main", "n = 32", "PHA", "cpu", "0.0001: 45.0, 0.001: 40.0"]
    assert cells(rates_table(trials, {}), "PHA") == [*listed, MISSING]
    found = suites([row("pha", seed, n=32, learning_rate=1e-4) for seed in (0, 1)])
    assert cells(rates_table(trials, found), "PHA") == [*listed, "0.0001"]


def test_transfer() -> None:
    scores = {("a", 0, "probe"): 0.5, ("a", 1, "probe"): 0.6, ("b", 0, "probe"): 0.7, ("a", 0, "head"): 0.8}
    rows = [
        {"task": task, "k": 4, "seed": seed, "method": method, "score": score, "seconds": 1.0}
        for (task, seed, method), score in scores.items()
    ]
    table = transfer_table(rows)
    assert cells(table, "a") == ["4", "a", "55.0 ± 7.1", "80.0"]
    assert cells(table, "b") == ["4", "b", "70.0", MISSING]
    assert cells(table, "**mean**") == ["4", "**mean**", "**60.0**", f"**{MISSING}**"]
    assert cells(transfer_differences(rows), "**all**") == ["4", "**all**", "+30.0 (+30.0 to +30.0; 1)"]


def test_transfer_inside_suites() -> None:
    def of(method: str, suite: str, task: str, score: float, seed: int = 3, **fields: Any) -> dict[str, Any]:
        row = {"suite": suite, "task": task, "k": 4, "seed": seed, "method": method, "score": score}
        return {**row, **({} if "_" in method else {"n": 100, "fit": "adapter", **fields})}

    rows = [
        *(of("probe_texts", suite, task, 0.5) for suite in ("fdu", "all") for task in ("a", "b")),
        of("plus", "fdu", "a", 0.1),  # run again
        *(of("plus", "fdu", task, score) for task, score in (("a", 0.6), ("b", 0.45))),
        *(of("plus", "all", task, 0.9) for task in ("a", "b")),
        of("plus", "fdu", "a", 0.7, fit="none"),
    ]
    table = suite_table(rows)
    methods = ["logistic regression on text features", "PHA+", "PHA+, fit none"]
    assert cells(table, "suite") == ["suite", "k", *methods]
    assert cells(table, "fdu (2 tasks)") == ["fdu (2 tasks)", "4", "50.0", "52.5", MISSING]
    table = suite_differences(rows)
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert [line[:3] for line in found] == [
        [suite, "4", method] for suite in ("fdu", "all", "**mean**") for method in methods[1:]
    ]
    assert found[0][3:] == ["+2.5 (-5.0 to +10.0; 2)", "b -5.0"]
    assert found[4][3:] == found[0][3:]  # without `all`


def test_only_text_between_markers_is_replaced() -> None:
    text = replaced(DOCUMENT, {"scores-main": "new", "ablations": "drawn"})
    assert text == DOCUMENT.replace("old\n", "\nnew\n\n").replace("ablations -->\n", "ablations -->\n\ndrawn\n\n")
    assert replaced(text, {"scores-main": "new", "ablations": "drawn"}) == text
    with pytest.raises(ValueError, match="needs its own line"):
        replaced(DOCUMENT.replace("<!-- end -->", "", 1), {"scores-main": "new", "ablations": "drawn"})


def test_twice_gives_the_same_files(tmp_path: Path) -> None:
    rows = [
        row(arm, seed, n, a=50.0 + seed) for arm in ("probe", "pha", "plus") for seed in (0, 1) for n in (32, "all")
    ]
    rows += [row(arm, seed) for arm in ("lora_task", "pha", "pha_no_instance") for seed in (0, 1)]
    first = written(tmp_path, rows)
    assert set(first) == {"sample-efficiency.md", "sample_efficiency.svg", "ablations.svg", "parameters.svg"}
    assert b"images/ablations.svg" in first["sample-efficiency.md"]
    assert "| n = 32 | PHA |" in (tmp_path / "README.md").read_text()
    assert written(tmp_path, rows) == first


def test_no_rows_no_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = written(tmp_path, [])
    assert set(found) == {"sample-efficiency.md"}
    assert found["sample-efficiency.md"].decode().count(NOTHING) == 2
    assert "not written, since there are no rows to show: sample_efficiency, ablations" in capsys.readouterr().err


def test_figures_of_another_suite(tmp_path: Path) -> None:
    rows = [row(arm, n=n, suite="fdu") for arm in ("pha_texts", "plus", "plus_no_maps") for n in (16, 32)]
    assert set(written(tmp_path, rows)) == {
        "sample-efficiency.md",
        "sample_efficiency_fdu.svg",
        "ablations_fdu.svg",
        "parameters_fdu.svg",
    }
