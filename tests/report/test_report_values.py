"""Reports: each figure has the numbers of the files, in the page and in the figures for papers. Promise 11."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from written_runs import HOSTILE, NAMES, result_rows, run_values, write_values

from hyperadapters.checkpoints.details_file import forget_tasks
from hyperadapters.checkpoints.format import CONFIG_FILE
from hyperadapters.errors import DataError
from hyperadapters.report.charts import Categories, Chart, Lines, Map, Matrix, Report, Table
from hyperadapters.report.compare_report import compare_report
from hyperadapters.report.maps import clustered
from hyperadapters.report.matplotlib_figures import draw, figure_bytes
from hyperadapters.report.page import as_page
from hyperadapters.report.plotly_figures import plotly_figure
from hyperadapters.report.result_rows import read_rows, rows_report
from hyperadapters.report.run_report import MAX_PANELS, MEAN, run_report
from hyperadapters.report.runs import CHECKPOINT_FILE, read_run
from hyperadapters.report.styles import MAX_SIZE, NEUTRAL, style_of

Charts = dict[str, Any]


def by_name(report: Report) -> Charts:
    return {chart.name: chart for chart in report.charts}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return run_values()


@pytest.fixture(scope="module")
def report(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Report:
    return run_report(read_run(write_values(tmp_path_factory.mktemp("runs") / "first", values)))


@pytest.fixture(scope="module")
def charts(report: Report) -> Charts:
    return by_name(report)


def test_a_report_has_all_figures_and_says_what_it_is_of(report: Report, charts: Charts, values: Any) -> None:
    assert list(charts) == [
        *("scores", "losses", "validation", "map-pca", "map-t-sne", "prototype-similarity"),
        *("routing-confusion", "coverage", "reliability", "reliability-before", "risk-coverage"),
        *("answered", "wrong-answers", "parameters", "time"),
    ]
    assert report.title == "Report on first"
    assert report.notes == ()
    assert report.facts["trained parameters"] == "62,000"
    assert report.facts["mean score, test"] == f"{values['metrics.json']['mean']['test']:.4f}"
    table = next(item for item in report.sections[3].content if isinstance(item, Table))
    assert [row[:3] for row in table.rows] == [
        ("intent", "12", "83.3%"),
        ("mood", "12", "100.0%"),
        ("size", "12", "91.7%"),
    ]
    assert table.rows[0][3] == f"{100 * values['details.json']['tasks'][0]['declined']:.1f}%"
    recipe, versions = report.sections[-1].content
    assert "backbone: some/model" in recipe.text
    assert ("torch", "2.13.0") in versions.rows


def test_scores_and_baselines_are_those_of_the_files(charts: Charts, values: Any) -> None:
    chart, metrics = charts["scores"], values["metrics.json"]
    assert chart.categories == ("intent (accuracy)", "mood (accuracy)", "size (pearson)", MEAN)
    expected = {
        "model": [metrics["tasks"][name]["test"]["pearson" if name == "size" else "accuracy"] for name in NAMES],
        "majority class": [task["majority"] for task in values["details.json"]["tasks"]],
        "linear probe": [values["comparison.json"]["test"]["linear_probe"][name] for name in NAMES],
    }
    assert {name: list(found[:-1]) for name, found in chart.series.items()} == expected
    assert chart.series["model"][-1] == pytest.approx(metrics["mean"]["test"])


def test_curves_are_those_of_the_files(charts: Charts, values: Any) -> None:
    details = values["details.json"]

    def xy(curve: dict[str, list[float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(curve["x"]), tuple(curve["y"])

    tasks = {task["name"]: task for task in details["tasks"]}
    classified = NAMES[:2]
    assert charts["losses"].lines == {name: xy(details["losses"][name]) for name in ("task", "instance", "prototype")}
    validation = {MEAN: details["validation_mean"], **details["validation"]}
    assert charts["validation"].lines == {name: xy(curve) for name, curve in validation.items()}
    assert "step 100" in charts["validation"].caption
    assert "With the preset plus, the scores of the finished model, which are under Scores, may differ" in (
        charts["validation"].caption
    )
    assert charts["risk-coverage"].lines == {name: xy(tasks[name]["risk"]) for name in classified}
    for chart, key in (("reliability", "reliability"), ("reliability-before", "reliability_before")):
        bins = {name: tasks[name][key] for name in classified}
        assert charts[chart].lines == {
            name: tuple(tuple(one[axis] for one in found) for axis in ("confidence", "accuracy"))
            for name, found in bins.items()
        }
        assert charts[chart].rows == dict.fromkeys(classified, (4, 4, 4, 4))
    assert charts["coverage"].lines == {
        name: tuple(tuple(rate[axis] for rate in tasks[name]["decline_rates"]) for axis in ("bound", "declined"))
        for name in NAMES
    }
    limits = {name: tasks[name]["error_limits"] for name in classified}
    assert charts["answered"].lines == {
        name: ((0.05, 0.2), (0.0, found[1]["answered"])) for name, found in limits.items()
    }
    assert charts["wrong-answers"].lines == {name: ((0.2,), (found[1]["wrong"],)) for name, found in limits.items()}


def test_the_routing_confusion_has_counts_and_shares(charts: Charts) -> None:
    chart = charts["routing-confusion"]
    assert chart.labels == (("10", "2", "0"), ("0", "12", "0"), ("0", "1", "11"))
    np.testing.assert_allclose(chart.values, np.array([[10, 2, 0], [0, 12, 0], [0, 1, 11]]) / 12, rtol=1e-12)


def test_similar_prototypes_are_neighbours_and_their_similarities_are_cosines(charts: Charts, values: Any) -> None:
    chart = charts["prototype-similarity"]
    vectors = dict(zip(NAMES, np.array(values["details.json"]["prototypes"]), strict=True))
    expected = [
        [vectors[a] @ vectors[b] / np.linalg.norm(vectors[a]) / np.linalg.norm(vectors[b]) for b in chart.columns]
        for a in chart.rows
    ]
    np.testing.assert_allclose(chart.values, expected, atol=1e-12)
    blocks = np.kron(np.eye(3), np.full((2, 2), 0.9))[:, [0, 2, 4, 1, 3, 5]][[0, 2, 4, 1, 3, 5]]
    order = clustered(np.maximum(blocks, np.eye(6)))
    assert sorted(sorted(order[place : place + 2]) for place in (0, 2, 4)) == [[0, 3], [1, 4], [2, 5]]


def test_the_maps_show_each_text_where_its_vector_is(charts: Charts, values: Any) -> None:
    points = values["details.json"]["points"]
    for name in ("map-pca", "map-t-sne"):
        chart = charts[name]
        assert list(chart.groups) == list(chart.marks) == list(NAMES)
        texts = [text for _, _, of_group in chart.groups.values() for text in of_group]
        assert [text.split("\n")[0] for text in texts] == [point["text"] for point in points]
        assert texts[0].split("\n")[1:] == ["task: intent", "target: yes", "answer: none"]
        for group, (x, y, _) in chart.groups.items():
            far = {mark: np.hypot(np.array(x) - a, np.array(y) - b).mean() for mark, (a, b) in chart.marks.items()}
            assert min(far, key=lambda mark: far[mark]) == group
    x, y = (np.concatenate([group[axis] for group in charts["map-pca"].groups.values()]) for axis in (0, 1))
    vectors = np.array([point["vector"] for point in points] + values["details.json"]["prototypes"])
    centred = vectors - vectors.mean(axis=0)
    singular = np.linalg.svd(centred)[1][:2]
    marks = np.array(list(charts["map-pca"].marks.values()))
    found = np.concatenate([np.stack([x, y], axis=1), marks])
    np.testing.assert_allclose(np.linalg.norm(found, axis=0), singular, rtol=1e-9)


def test_parameters_and_time_are_those_of_the_files(charts: Charts) -> None:
    assert charts["parameters"].categories == ("heads", "hypernetwork")
    assert charts["parameters"].series == {"parameters": (2000, 60_000)}
    assert "22,000,000" in charts["parameters"].caption
    assert charts["time"].categories == ("training steps", "final evaluation")
    assert charts["time"].series == {"seconds": (40.5, 1.25)}


def test_a_run_without_routing_heads_and_texts_has_the_other_figures(tmp_path: Path) -> None:
    values = run_values()
    details = values["details.json"]
    details |= {"prototypes": [], "confusion": [], "points": []}
    for task in details["tasks"]:
        task |= {"declined": None, "decline_rates": [], "reliability": [], "reliability_before": []}
        task |= {"risk": {}, "error_limits": []}
    values["metrics.json"] |= {"calibration": {}, "routing_accuracy": None}
    del values["comparison.json"]
    report = run_report(read_run(write_values(tmp_path, values)))
    assert list(by_name(report)) == ["scores", "losses", "validation", "parameters", "time"]
    assert "Routing" not in [section.title for section in report.sections]


def test_without_the_details_and_the_recipe_the_metrics_are_shown_and_what_is_missing_is_said(tmp_path: Path) -> None:
    values = run_values()
    metrics = values["metrics.json"]
    metrics["tasks"]["mood"]["test"]["macro_f1"] = 0.125  # not the first, so not the main metric
    values |= {"details.json": None, "resolved_recipe.yaml": None}
    report = run_report(read_run(write_values(tmp_path / "run", values)))
    assert [section.title for section in report.sections] == ["Scores", "Certainty"]
    chart = by_name(report)["scores"]
    assert chart.categories == ("intent (accuracy)", "mood (accuracy)", "size (pearson)", MEAN)
    assert chart.series["model"][:-1] == tuple(
        metrics["tasks"][name]["test"]["pearson" if name == "size" else "accuracy"] for name in NAMES
    )
    assert chart.series["linear probe"][0] == values["comparison.json"]["test"]["linear_probe"]["intent"]
    rows = [row for item in report.sections[0].content if isinstance(item, Table) for row in item.rows]
    assert ("mood", "macro_f1", "", "0.1250") in rows
    assert report.facts["training"] == "42 s"
    assert report.facts["routing accuracy, test"] == "95.0%"
    assert "backbone" not in report.facts
    assert [note.split(",")[0] for note in report.notes] == [
        "The folder has no details.json",
        "The folder has no resolved_recipe.yaml",
    ]
    assert all("train the recipe again" in note for note in report.notes)
    pytest.importorskip("plotly", reason="the page needs the extra 'report'")
    assert report.notes[0] in as_page(report)


def test_tasks_are_shown_as_they_were_trained_and_later_changes_are_named(tmp_path: Path) -> None:
    values = run_values()
    details, metrics, checkpoint = (values[f"{name}.json"] for name in ("details", "metrics", "hyperadapter"))
    run = write_values(tmp_path / "run", values)
    forget_tasks(run, {"mood", "size"})  # as removing "intent" does
    checkpoint["tasks"] = [{"name": "feeling"}, {"name": "size"}, {"name": "urgent"}]
    checkpoint["renamed"] = {"feeling": "mood"}
    (run / "hyperadapter.json").write_text(json.dumps(checkpoint))
    report = run_report(read_run(run))
    charts = by_name(report)
    assert report.facts["tasks"] == "3"
    assert charts["scores"].categories == ("intent (accuracy)", "mood (accuracy)", "size (pearson)", MEAN)
    assert charts["scores"].series["model"][0] == metrics["tasks"]["intent"]["test"]["accuracy"]
    assert f"{charts['scores'].series['model'][-1]:.4f}" == report.facts["mean score, test"]
    assert list(charts["map-pca"].groups) == ["mood", "size"]
    (note,) = report.notes
    assert note.startswith(
        "The report shows the tasks as they were trained. They have changed since. Removed: 'intent'. "
    )
    assert "the routing accuracy" in note
    assert note.endswith("Renamed: 'mood' to 'feeling'. Added, and therefore not evaluated in this run: 'urgent'.")
    assert len(details["tasks"]) == 3


def test_a_task_that_was_removed_and_added_again_is_named_as_both(tmp_path: Path) -> None:
    run = write_values(tmp_path / "run", run_values())
    forget_tasks(run, {"mood", "size"})
    (note,) = run_report(read_run(run)).notes
    assert "Removed: 'intent'." in note
    assert note.endswith("not evaluated in this run: 'intent'.")


def test_the_file_of_the_tasks_is_that_of_checkpoints() -> None:
    assert CHECKPOINT_FILE == CONFIG_FILE


# Result rows and comparisons


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Report:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, result_rows())) + "\n")
    return rows_report(path, *read_rows(path))


def test_result_rows_are_shown_as_means_and_deviations_over_seeds(rows: Report) -> None:
    charts = by_name(rows)
    assert list(charts) == ["scores-1-1", "tasks-1-1", "scores-1-2", "tasks-1-2", "parameters-1", "time-1"]
    scores = charts["scores-1-1"]
    assert scores.categories == ("pha", "probe")
    assert scores.series == {"mean score": (66.0, 65.5)}
    assert scores.errors["mean score"] == pytest.approx((2**-0.5, 2**-0.5))
    assert "not comparable" not in scores.caption
    tables = [item for item in rows.sections[0].content if isinstance(item, Table)]
    assert [table.title for table in tables] == ["Scores, n = 16", "Scores, n = 100"]
    assert tables[0].rows == (("pha", "66.00", "0.71", "2", "2"), ("probe", "65.50", "0.71", "2", "2"))
    assert charts["parameters-1"].lines == {"pha": ((2000, 2000), (66.0, 66.0)), "probe": ((1000, 1000), (65.5, 65.5))}
    assert charts["time-1"].series["n = 100"] == (4.0, 4.0)


def test_trials_that_failed_are_counted(rows: Report, tmp_path: Path) -> None:
    assert "failed trials" not in rows.facts
    path = tmp_path / "rows.jsonl"
    failed = {"trial": 1, "settings": {}, "error": "out of memory"}
    path.write_text("\n".join(map(json.dumps, [*result_rows(), failed, failed])))
    report = rows_report(path, *read_rows(path))
    assert report.facts == {**rows.facts, "failed trials": "2"}
    assert report.sections == rows.sections


def test_the_colours_of_scores_by_task_compare_arms_and_not_metrics(rows: Report) -> None:
    chart = by_name(rows)["tasks-1-2"]
    assert (chart.rows, chart.columns) == (("pha", "probe"), ("mood", "topic"))
    assert chart.labels == (("61.5", "70.5"), ("60.5", "70.5"))
    assert chart.values == ((0.0, 0.0), (-1.0, 0.0))
    assert chart.limits == (-1.0, 0.0)


def test_arms_are_ranked_among_those_of_the_same_size(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    scores = [("good", 16, 0, 50.0), ("bad", 16, 0, 40.0), ("bad", 100, 0, 80.0), ("bad", 100, 1, 81.0)]
    scores.append(("other", 100, 0, 90.0))
    path.write_text(
        "\n".join(
            json.dumps({"arm": arm, "n": n, "seed": seed, "scores": {"mood": score}, "score": score})
            for arm, n, seed, score in scores
        )
    )
    report = rows_report(path, *read_rows(path))
    charts = by_name(report)
    assert charts["scores-1-1"].categories == ("good", "bad")
    assert charts["scores-1-2"].categories == ("other", "bad")
    assert "not comparable" not in charts["scores-1-1"].caption
    assert "Not all arms have the same seeds and tasks" in charts["scores-1-2"].caption
    tables = [item for item in report.sections[0].content if isinstance(item, Table)]
    assert tables[1].rows == (("other", "90.00", "", "1", "1"), ("bad", "80.50", "0.71", "2", "1"))


def compared_values() -> dict[str, Any]:
    """A run with two tasks of the first, whose main metric is another one for one of them."""
    values = run_values(("size", "mood", "other"), seed=1)
    for of_split in values["metrics.json"]["tasks"]["size"].values():
        of_split["pearson"] = 0.25 + of_split["accuracy"] / 4
    return values


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Report:
    folder = tmp_path_factory.mktemp("compared")
    first, second = run_values(), compared_values()
    return compare_report([read_run(write_values(folder / name, v)) for name, v in (("a", first), ("b", second))])


def test_a_comparison_has_the_common_tasks_of_each_run_and_the_settings_that_differ(compared: Report) -> None:
    charts = by_name(compared)
    assert list(charts) == [
        *("scores", "loss-task", "loss-instance", "loss-prototype", "validation", "calibration", "parameters", "time")
    ]
    assert charts["scores"].categories == ("mood (accuracy)", "size (pearson)", MEAN)
    first, second = run_values(), compared_values()
    mood = [values["metrics.json"]["tasks"]["mood"]["test"]["accuracy"] for values in (first, second)]
    size = [values["metrics.json"]["tasks"]["size"]["test"]["pearson"] for values in (first, second)]
    of_runs = [charts["scores"].series[run] for run in "ab"]
    assert [found[:2] for found in of_runs] == list(zip(mood, size, strict=True))
    assert [found[2] for found in of_runs] == [pytest.approx(sum(pair) / 2) for pair in zip(mood, size, strict=True)]
    table = compared.sections[0].content[1]
    assert isinstance(table, Table)
    assert table.header == ("task", "metric", "a", "b")
    assert table.rows[0] == ("mood", "accuracy", *(f"{value:.4f}" for value in mood))
    assert table.rows[2] == (MEAN, "", *(f"{found[2]:.4f}" for found in of_runs))
    assert compared.facts == {"runs": "2", "tasks in common": "2", "split": "test"}
    validation = [values["details.json"]["validation"]["mood"] for values in (first, second)]  # "size": other metrics
    assert charts["validation"].lines == {
        run: (tuple(curve["x"]), tuple(curve["y"])) for run, curve in zip("ab", validation, strict=True)
    }
    curves = [values["details.json"]["losses"]["task"] for values in (first, second)]
    assert charts["loss-task"].lines == {
        run: (tuple(curve["x"]), tuple(curve["y"])) for run, curve in zip("ab", curves, strict=True)
    }
    errors = [values["metrics.json"]["calibration"]["mood"]["test"]["calibration_error"] for values in (first, second)]
    assert [charts["calibration"].series[run][0] for run in "ab"] == errors
    assert charts["parameters"].series == {"trained parameters": (62_000, 62_001)}
    table = compared.sections[-1].content[0]
    assert isinstance(table, Table)
    assert table.rows == (("seed", "0", "1"),)


def test_only_scores_of_the_same_metric_on_the_same_split_are_compared(tmp_path: Path) -> None:
    first, second = run_values(), run_values(seed=1)
    second["details.json"]["split"] = "validation"
    for scores in second["metrics.json"]["tasks"].values():
        del scores["test"]
    second["metrics.json"]["calibration"]["mood"]["validation"] = {"calibration_error": 0.125}
    runs = [read_run(write_values(tmp_path / name, v)) for name, v in (("a", first), ("b", second))]
    report = compare_report(runs)
    charts = by_name(report)
    assert report.facts["split"] == "validation"
    assert charts["scores"].title == "Scores on validation rows"
    scores = [values["metrics.json"]["tasks"]["mood"]["validation"]["accuracy"] for values in (first, second)]
    assert [charts["scores"].series[run][1] for run in "ab"] == scores
    assert charts["calibration"].series == {"a": (None,), "b": (0.125,)}
    for task, of_splits in second["metrics.json"]["tasks"].items():
        of_splits["validation"] = {"macro_f1": 0.5}
        next(one for one in second["details.json"]["tasks"] if one["name"] == task)["metric"] = "macro_f1"
    other = read_run(write_values(tmp_path / "b", second))
    with pytest.raises(DataError, match="the same metric of a common task on the same split, found none"):
        compare_report([runs[0], other])


def test_a_comparison_shows_a_run_without_details_by_its_metrics(tmp_path: Path) -> None:
    first, second = run_values(), run_values(seed=1) | {"details.json": None}
    runs = [read_run(write_values(tmp_path / name, v)) for name, v in (("a", first), ("b", second))]
    report = compare_report(runs[::-1])
    charts = by_name(report)
    assert list(charts["scores"].series) == ["b", "a"]
    assert list(charts["loss-task"].lines) == ["a"]
    colours = {plotly_figure(charts[name])["data"][-1]["marker"]["color"] for name in ("scores", "loss-task")}
    assert colours == {style_of(1).colour}
    assert [note.split(",")[0] for note in report.notes] == ["b: The folder has no details.json"]
    del first["details.json"]
    without = read_run(write_values(tmp_path / "c", first))
    assert list(by_name(compare_report([runs[1], without]))) == ["scores", "calibration", "parameters"]


def test_runs_of_the_same_name_are_told_apart_by_the_folders_above(tmp_path: Path) -> None:
    runs = [read_run(write_values(tmp_path / name / "run", run_values())) for name in ("a", "b")]
    assert list(by_name(compare_report(runs))["scores"].series) == ["a/run", "b/run"]


# Both kinds of figures


def all_charts(charts: Charts, rows: Report) -> list[Chart]:
    return [*charts.values(), *rows.charts]


def test_plotly_figures_are_valid_and_have_the_numbers_of_the_charts(charts: Charts, rows: Report) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects", reason="the page needs the extra 'report'")
    for chart in all_charts(charts, rows):
        figure = plotly_figure(chart)
        graph_objects.Figure(figure)  # refuses unknown attributes
        data = figure["data"]
        if isinstance(chart, Categories):
            assert [tuple(trace["x"]) for trace in data] == list(chart.series.values())
            assert all(list(map(round, trace["y"])) == list(range(len(chart.categories))) for trace in data)
            assert figure["layout"]["yaxis"]["ticktext"] == list(chart.categories)
        elif isinstance(chart, Lines):
            assert {trace["name"]: (tuple(trace["x"]), tuple(trace["y"])) for trace in data} == chart.lines
        elif isinstance(chart, Matrix):
            assert tuple(map(tuple, data[0]["z"])) == chart.values
            assert (data[0]["zmin"], data[0]["zmax"]) == chart.limits
        else:
            points = [trace for trace in data if trace["marker"]["symbol"] != "star"]
            assert [(tuple(trace["x"]), tuple(trace["y"])) for trace in points] == [
                (x, y) for x, y, _ in chart.groups.values()
            ]
            stars = [trace for trace in data if trace["marker"]["symbol"] == "star"]
            assert [(trace["x"][0], trace["y"][0]) for trace in stars] == list(chart.marks.values())


def test_figures_for_papers_have_the_numbers_of_the_charts(charts: Charts, rows: Report) -> None:
    for chart in all_charts(charts, rows):
        figure = draw(chart)
        axes = figure.axes[0]
        if isinstance(chart, Lines) and chart.rows:
            points = [one for panel in figure.axes for one in panel.collections]
            drawn = [tuple(map(tuple, one.get_offsets().T.tolist())) for one in points]
            assert drawn == list(chart.lines.values())
        elif isinstance(chart, Lines):
            lines = [line for panel in figure.axes for line in panel.lines if line.get_linestyle() != ":"]
            drawn = [tuple(map(tuple, line.get_data())) for line in lines]
            assert drawn == list(chart.lines.values())[: len(drawn)]
            assert len(drawn) == len(chart.lines)
        elif isinstance(chart, Matrix):
            assert axes.images[0].get_array().tolist() == [list(row) for row in chart.values]
        elif isinstance(chart, Map):
            drawn = [tuple(map(tuple, one.get_offsets().T.tolist())) for one in axes.collections][:-1:2]
            assert drawn == [(x, y) for x, y, _ in chart.groups.values()]
        elif chart.mark == "bars":
            assert [bar.get_width() for bar in axes.patches] == [v for of in chart.series.values() for v in of]
            assert [text.get_text() for text in axes.texts] == [f"{v:,g}" for of in chart.series.values() for v in of]
        else:
            assert [tuple(one.lines[0].get_xdata()) for one in axes.containers] == list(chart.series.values())


def test_equal_values_of_two_series_do_not_hide_each_other() -> None:
    chart = Categories("name", "title", "caption", ("a", "b"), {"x": (1.0, 2.0), "y": (1.0, None)}, "axis")
    x, y = (trace["y"] for trace in plotly_figure(chart)["data"])
    assert [below - above for above, below in zip(x, y, strict=True)] == pytest.approx([0.27 / 1.27] * 2)
    drawn = [list(map(float, one.lines[0].get_ydata())) for one in draw(chart).axes[0].containers]
    np.testing.assert_allclose(drawn, [x, y])


def test_losses_and_reliability_have_a_panel_for_each_line(charts: Charts) -> None:
    assert [name for name, chart in charts.items() if isinstance(chart, Lines) and chart.panels] == [
        *("losses", "reliability", "reliability-before")
    ]
    for name in ("losses", "reliability"):
        chart = charts[name]
        figure = plotly_figure(chart)
        names = list(chart.lines)
        assert len(names) > 1
        axes = [(trace["xaxis"], trace["yaxis"]) for trace in figure["data"]]
        assert axes == [("x", "y"), ("x2", "y2"), ("x3", "y3")][: len(names)]
        placed = {note["xref"]: note["text"] for note in figure["layout"]["annotations"] if note["xref"] != "paper"}
        assert placed == {f"{x} domain": name for (x, _), name in zip(axes, names, strict=True)}
        titles = [note["text"] for note in figure["layout"]["annotations"] if note["xref"] == "paper"]
        assert titles == [chart.x_axis, chart.y_axis]
        assert [shape["xref"] for shape in figure["layout"]["shapes"]] == [x for x, _ in axes if chart.diagonal]
        panels = draw(chart).axes
        assert [panel.get_title() for panel in panels] == names
        assert [len(panel.collections) + len(panel.lines) for panel in panels] == [1 + chart.diagonal] * len(names)
    sizes = [trace["marker"]["size"] for trace in plotly_figure(charts["reliability"])["data"]]
    assert sizes == [[MAX_SIZE] * 4] * 2


def test_a_diagonal_of_zeros_is_drawn(recwarn: pytest.WarningsRecorder) -> None:
    line = {"a": ((0.0,), (0.0,))}
    chart = Lines("name", "title", "caption", line, "x", "y", diagonal=True, rows={"a": (3,)}, panels=True)
    assert draw(chart).axes[0].get_xlim() == chart.limits == (-0.1, 1.1)
    assert plotly_figure(chart)["layout"]["shapes"][0]["x1"] == 1
    assert len(recwarn) == 0


def test_many_tasks_share_one_reliability_diagram(tmp_path: Path) -> None:
    values = run_values()
    details = values["details.json"]
    first = details["tasks"][0]
    details["tasks"] += [first | {"name": f"task {index}"} for index in range(MAX_PANELS)]
    chart = by_name(run_report(read_run(write_values(tmp_path, values))))["reliability"]
    assert len(chart.lines) == MAX_PANELS + 2
    assert not chart.panels
    assert len(draw(chart).axes) == 1


def test_bars_show_whole_numbers_with_all_digits() -> None:
    chart = Categories("name", "title", "caption", ("a", "b"), {"x": (1_724_544.0, 384.0)}, "axis", "bars")
    (trace,) = plotly_figure(chart)["data"]
    assert trace["text"] == ["1,724,544", "384"]
    assert trace["hovertext"][0] == "a<br>x: 1,724,544"
    assert [text.get_text() for text in draw(chart).axes[0].texts] == ["1,724,544", "384"]
    assert "e" not in "".join(label.get_text() for label in draw(chart).axes[0].get_xticklabels())


def test_a_task_has_the_same_colour_in_all_figures_and_the_mean_that_of_no_task(tmp_path: Path) -> None:
    values = run_values()
    values["details.json"]["tasks"][0]["risk"] = {}  # so that the other tasks have other places in this figure
    charts = by_name(run_report(read_run(write_values(tmp_path, values))))
    of_page: dict[str, set[str]] = {}
    of_files: dict[str, set[str]] = {}
    for name in ("validation", "map-pca", "risk-coverage", "coverage"):
        for trace in plotly_figure(charts[name])["data"]:
            of_page.setdefault(trace["name"], set()).add(trace["marker"]["color"])
        for handle, label in zip(*draw(charts[name]).axes[0].get_legend_handles_labels(), strict=True):
            colour = handle.get_facecolor()[0] if hasattr(handle, "get_facecolor") else handle.get_color()
            of_files.setdefault(label, set()).add(to_hex(colour))
    del of_files["prototype"]  # the star of the legend
    colours = {name: {style_of(index).colour} for index, name in enumerate(NAMES)}
    assert of_page == of_files == {**colours, MEAN: {NEUTRAL}}


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_same_figure_is_the_same_file(charts: Charts, ending: str) -> None:
    content = figure_bytes(charts["scores"], ending)
    assert content.startswith(b"\x89PNG" if ending == ".png" else b"<?xml")
    assert content == figure_bytes(charts["scores"], ending)


def test_the_page_contains_the_figures_and_nothing_from_elsewhere(report: Report) -> None:
    pytest.importorskip("plotly", reason="the page needs the extra 'report'")
    page = as_page(report)
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page)
    assert found is not None
    figures = json.loads(found[1])["figures"]
    assert figures == {chart.name: plotly_figure(chart) for chart in report.charts}
    outside = page[: found.start()]
    assert re.findall(r"""(?:src|href)\s*=\s*["'](?!#)|url\(|@import""", outside) == []
    assert "default-src 'none'" in outside


def test_hostile_names_and_texts_stay_texts(tmp_path: Path) -> None:
    pytest.importorskip("plotly", reason="the page needs the extra 'report'")
    values = run_values(HOSTILE)
    for point, text in zip(values["details.json"]["points"], HOSTILE, strict=False):
        point |= {"text": text, "answer": text}
    report = run_report(read_run(write_values(tmp_path, values)))
    page = as_page(report)
    assert len(re.findall("<script", page)) == len(re.findall("</script>", page)) == 3
    assert "<img" not in page.replace('<img src="', "")  # the one of Plotly's own code
    assert "\u2028" not in page
    assert "\u202e" not in page
    for chart in report.charts:
        figure = plotly_figure(chart)
        texts = re.findall(r'"((?:[^"\\]|\\.)*)"', json.dumps(figure).replace("<br>", " "))
        assert [text for text in texts if "<" in text] == []
        draw(chart)
    assert figure_bytes(by_name(report)["scores"], ".svg").startswith(b"<?xml")  # no mathematics in "$x^2$"
    hover = plotly_figure(by_name(report)["map-pca"])["data"][0]["hovertext"][0]
    assert hover.startswith("&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;<br>task: &lt;/script&gt;")


def test_quotation_marks_are_shown_as_they_are(tmp_path: Path) -> None:
    values = run_values(('a "b"', "it's", "size"))
    values["details.json"]["points"][0]["text"] = 'He said "stop" & left'
    report = run_report(read_run(write_values(tmp_path, values)))
    data = plotly_figure(by_name(report)["map-pca"])["data"]
    assert data[0]["hovertext"][0].startswith('He said "stop" &amp; left<br>task: a "b"<br>')
    assert [data[0]["name"], data[2]["name"]] == ['a "b"', "it's"]


def test_names_that_are_equal_when_they_are_shortened_stay_apart(tmp_path: Path) -> None:
    names = ("x" * 90 + "1", "x" * 90 + "2", "2024-01-01")
    charts = by_name(run_report(read_run(write_values(tmp_path, run_values(names)))))
    figure = plotly_figure(charts["scores"])
    assert list(map(round, figure["data"][0]["y"])) == [0, 1, 2, 3]
    assert len(figure["layout"]["yaxis"]["ticktext"]) == 4
    assert len(draw(charts["scores"]).axes[0].get_yticklabels()) == 4
