"""The check as a whole, on damaged tasks and a tiny backbone. What the reports show is harmless (promise 11)."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers import save_backbone
from rich.console import Console

from hyperadapters.config import Split, TaskEntry, parse
from hyperadapters.errors import DataError, RecipeError
from hyperadapters.quality.check import CheckSettings, check_tasks, read_input
from hyperadapters.quality.findings import MAX_EXAMPLES, Finding, Lengths, QualityReport, TaskSummary, excerpt
from hyperadapters.quality.languages import LanguageIdentifier
from hyperadapters.quality.writers import as_html, as_json, print_report

HOSTILE = '<script>alert(1)</script> [red]w1[/red] {{ 7 * 7 }} \x1b[31m \u202egnp.exe & "quoted"'
GERMAN = "Ich möchte bitte wissen, warum meine Überweisung noch nicht angekommen ist"
ENGLISH = [
    "I would like to know why the transfer has not arrived yet",
    "The driver came too late and the box was wet",
    "Please tell me when the shop in the old town opens",
    "My new card does not work in the machine at the station",
    "This was the best evening that we had in many years",
    "Nobody answered the phone although I waited for an hour",
    "The soup was cold and the waiter forgot our drinks",
    "How can I change the address of my last order",
    "We were very happy with the friendly help in the office",
    "The film has a good beginning and a very weak end",
]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_backbone(tmp_path_factory.mktemp("bert")))


def clean(split: str) -> list[dict[str, Any]]:
    """English rows of two labels, none of which is in another split."""
    words = {"train": "monday tuesday", "validation": "wednesday thursday", "test": "friday saturday"}[split].split()
    subjects = {"train": "teacher doctor", "validation": "sister captain", "test": "farmer singer"}[split].split()
    places = ["in the garden", "at the station", "under the bridge", "near the castle", "behind the school"]
    return [
        {"text": f"{text} said the {subject} on {day} {place}", "label": label}
        for label, texts in (("good", ENGLISH[:5]), ("bad", ENGLISH[5:]))
        for text, place in zip(texts, places, strict=True)
        for subject, day in zip(subjects, words, strict=True)
    ]


def task(folder: Path, name: str = "mood", **settings: Any) -> TaskEntry:
    """Write the splits of a task and return its entry; settings whose values are rows are splits."""
    splits = {split: settings.pop(split) for split in ("train", "validation", "test") if split in settings}
    paths = {}
    for split, rows in splits.items():
        path = folder / f"{name}-{split}.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        paths[split] = str(path)
    return parse(TaskEntry, {"name": name, "source": {"path": paths}, **settings}, RecipeError)


def check(backbone: str, *entries: TaskEntry, **settings: Any) -> QualityReport:
    values = {"backbone": backbone, "max_length": 64, "max_label_rows": 0, **settings}
    return check_tasks(entries, CheckSettings(**values))


def found(report: QualityReport, check: str) -> Finding:
    [finding] = [finding for finding in report.findings if finding.check == check]
    return finding


def checks(report: QualityReport) -> dict[str, str]:
    return {finding.check: finding.severity for finding in report.findings if finding.severity != "info"}


def test_clean_data_are_ready(tmp_path: Path, backbone: str) -> None:
    splits = {split: [dict(row) for row in clean(split)] for split in ("train", "test")}
    report = check(backbone, task(tmp_path, **splits))
    assert {key: value for key, value in checks(report).items() if key != "near_leakage"} == {}
    assert report.tasks[0].rows == {"train": 20, "test": 20}
    assert report.tasks[0].labels == {"bad": 10, "good": 10}


def test_copied_test_rows_are_an_error_with_both_places(tmp_path: Path, backbone: str) -> None:
    test = clean("test")
    copy = {**test[3], "text": test[3]["text"].upper().replace(" ", "  ") + "!"}
    report = check(backbone, task(tmp_path, train=[*clean("train"), copy], test=test))
    finding = found(report, "leakage")
    assert (finding.severity, finding.count) == ("error", 1)
    assert finding.message == "1 of 20 test rows are train rows too, but for case, spaces and punctuation."
    [example] = finding.examples
    assert example.place == f"{tmp_path}/mood-test.jsonl, line 4"
    assert example.note == f"equal to {tmp_path}/mood-train.jsonl, line 21"
    assert report.worst() == "error"
    assert report.verdict().startswith("Not ready: 1 error")


def test_a_changed_word_is_a_warning(tmp_path: Path, backbone: str) -> None:
    test = [{"text": "Could you please send the parcel to the office in the old town", "label": "good"}, *clean("test")]
    copy = {"text": "Could you please send the parcel to the shop in the old town", "label": "bad"}
    finding = found(check(backbone, task(tmp_path, train=[copy, *clean("train")], test=test[:1])), "near_leakage")
    assert (finding.severity, finding.count) == ("warning", 1)
    assert finding.message.endswith("are almost equal to train rows, 1 of them with another label.")
    assert "line 1, which has another label" in finding.examples[0].note


def test_rows_that_another_task_trains_on_are_found(tmp_path: Path, backbone: str) -> None:
    test = clean("test")
    first = task(tmp_path, "first", train=[*clean("train"), test[0]])
    second = task(tmp_path, "second", train=clean("validation"), test=test)
    report = check(backbone, first, second)
    leak = found(report, "leakage_between_tasks")
    assert (leak.task, leak.severity) == ("second", "warning")
    assert "first (" in leak.message
    assert leak.examples[0].note == f"equal to {tmp_path}/first-train.jsonl, line 21"
    shared = check(backbone, task(tmp_path, "a", train=clean("train")), task(tmp_path, "b", train=clean("train")))
    assert {finding.count for finding in shared.findings if finding.check == "shared_inputs"} == {20}


def test_contradictory_labels_are_found(tmp_path: Path, backbone: str) -> None:
    rows = clean("train")
    finding = found(check(backbone, task(tmp_path, train=[*rows, {**rows[0], "label": "bad"}])), "contradictory")
    assert (finding.count, [example.note for example in finding.examples]) == (1, ["label good", "label bad"])
    numbers = [{"text": text, "label": n} for n, text in enumerate(ENGLISH)]
    same = [*numbers, {"text": ENGLISH[0], "label": 0.5}]
    assert "contradictory" not in checks(check(backbone, task(tmp_path, train=same, kind="regression")))
    other = [*numbers, {"text": ENGLISH[0], "label": 5}]
    assert "contradictory" in checks(check(backbone, task(tmp_path, train=other, kind="regression")))


def test_empty_texts_and_labels_without_training_rows_are_found(tmp_path: Path, backbone: str) -> None:
    train = [*clean("train"), {"text": " ?! ", "label": "good"}]
    test = [*clean("test")[:2], {"text": "w1 w2", "label": "neutral"}]
    report = check(backbone, task(tmp_path, train=train, test=test))
    assert found(report, "empty").examples[0].place.endswith("mood-train.jsonl, line 21")
    unseen = found(report, "unseen_label")
    assert (unseen.severity, unseen.message) == ("error", "1 label without a training row: neutral.")
    assert unseen.examples[0].place.endswith("mood-test.jsonl, line 3")


def test_one_label_rare_and_dominant_and_similar_labels_are_found(tmp_path: Path, backbone: str) -> None:
    one = [{"text": text, "label": "good"} for text in ENGLISH]
    assert checks(check(backbone, task(tmp_path, train=one)))["one_label"] == "error"
    two = [*one, {"text": "Something else happened there", "label": "Good"}]
    severities = checks(check(backbone, task(tmp_path, train=two)))
    assert severities == {"rare_label": "warning", "dominant_label": "warning", "similar_labels": "warning"}


def test_labels_of_multi_label_tasks_are_counted_one_by_one(tmp_path: Path, backbone: str) -> None:
    train = [{"text": text, "label": ["good", "long"][: 1 + n % 2]} for n, text in enumerate(ENGLISH)]
    test = [{"text": "w1 w2", "label": ["good", "neutral"]}, {"text": "w3 w4", "label": []}]
    report = check(backbone, task(tmp_path, kind="multi-label", train=train, test=test))
    assert found(report, "unseen_label").message == "1 label without a training row: neutral."
    assert report.tasks[0].labels == {"good": len(ENGLISH), "long": len(ENGLISH) // 2}
    none = check(backbone, task(tmp_path, kind="multi-label", train=[{"text": "w1 w2", "label": []}]))
    assert found(none, "one_label").message == "No row has a label."
    joined = [{"text": "w1 w2", "label": ["a;b"]}, *train]
    unreadable = found(check(backbone, task(tmp_path, kind="multi-label", train=joined)), "unreadable")
    assert "found ';' in the label 'a;b'" in unreadable.message


def test_each_finding_has_a_limited_number_of_examples(tmp_path: Path, backbone: str) -> None:
    test = [{"text": f"w{n}", "label": f"new {n // 10}"} for n in range(2 * MAX_EXAMPLES)]
    unseen = found(check(backbone, task(tmp_path, train=clean("train"), test=test)), "unseen_label")
    assert len(unseen.examples) == MAX_EXAMPLES


def test_unreadable_rows_are_as_grave_as_the_training_takes_them(tmp_path: Path, backbone: str) -> None:
    entry = task(tmp_path, train=[*clean("train"), '{"text": 5, "label": "good"}', "no json"])
    for on_bad_row, severity in (("error", "error"), ("skip", "warning")):
        finding = found(check(backbone, entry, on_bad_row=on_bad_row), "unreadable")
        assert (finding.severity, finding.count) == (severity, 2)
        assert "mood-train.jsonl, line 22: expected a JSON object" in finding.message


def test_truncated_inputs_are_counted(tmp_path: Path, backbone: str) -> None:
    train = [*clean("train"), {"text": "w1 " * 30, "label": "good"}]
    report = check(backbone, task(tmp_path, train=train), max_length=25)
    lengths = report.tasks[0].lengths
    assert (lengths.longest, lengths.truncated) == (31, 1)  # with the token at the end
    finding = found(report, "truncated")
    assert (finding.severity, finding.examples[0].note) == ("info", "31 tokens")
    assert found(check(backbone, task(tmp_path, train=train), max_length=8), "truncated").severity == "warning"


def test_texts_in_another_language_are_found(tmp_path: Path, backbone: str) -> None:
    train = [*clean("train"), {"text": GERMAN, "label": "bad"}]
    finding = found(check(backbone, task(tmp_path, train=train)), "foreign")
    assert (finding.count, finding.examples[0].place) == (1, f"{tmp_path}/mood-train.jsonl, line 21")
    assert finding.message == "1 row in another language than en."
    assert LanguageIdentifier()(GERMAN)[0] == "de"


def test_flipped_labels_are_found_with_the_features_of_the_backbone(tmp_path: Path, backbone: str) -> None:
    train = [{"text": f"w{index} " * (2 + n % 7), "label": f"l{index}"} for index in range(3) for n in range(30)]
    train = [{**row, "text": row["text"] + f"w{10 + n % 25}"} for n, row in enumerate(train)]
    train[4] = {**train[4], "label": "l2"}
    report = check(backbone, task(tmp_path, train=train), max_label_rows=1000)
    finding = found(report, "label_errors")
    assert finding.examples[0].place == f"{tmp_path}/mood-train.jsonl, line 5"
    assert "label l2, rather l0" in finding.examples[0].note
    assert f"with the features of the frozen encoder {backbone}" in report.notes[-1]


def hostile_report(folder: Path, backbone: str) -> QualityReport:
    train = [*clean("train"), {"text": HOSTILE, "label": HOSTILE}, {"text": HOSTILE, "label": "good"}]
    return check(backbone, task(folder, "m[red]o<b>od", train=train))


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [(name, value) for name, value in attrs if name in ("src", "href", "srcset", "style", "onload")]


def test_the_page_escapes_texts_and_loads_nothing(tmp_path: Path, backbone: str) -> None:
    page = as_html(hostile_report(tmp_path, backbone))
    parser = _Tags()
    parser.feed(page)
    assert not parser.tags & {"script", "b", "img", "link", "iframe"}
    assert parser.links == []
    assert "http" not in page.replace("http-equiv", "")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page
    assert "\u202e" not in page


def test_the_tables_show_texts_as_they_are(tmp_path: Path, backbone: str) -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    print_report(hostile_report(tmp_path, backbone), console)
    text = console.export_text()
    assert "[red]w1[/red]" in text
    assert "m[red]o<b>od" in text
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "contradictory" in text


@pytest.mark.parametrize(
    "long_name", ["support_intent", "a task with a name that is longer than the table has room for"]
)
def test_the_table_of_tasks_fits_into_eighty_columns_with_its_names(long_name: str) -> None:
    lengths = Lengths(median=128, percentile_95=400, longest=12_345, max_length=128, truncated=23_456)
    rows: dict[Split, int] = {"train": 123_456, "validation": 12_345, "test": 12_345}
    names = ("message_spam", long_name)
    tasks = [TaskSummary(name, "classification", rows, {"yes": 3, "no": 4}, lengths) for name in names]
    console = Console(width=80, file=io.StringIO())
    print_report(QualityReport(tasks, []), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    table, _, _ = text.partition("tokens: ")
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in text
    assert "message_spam" in text
    assert [number in text for number in ("123,456", "12,345", "128", "23,456")] == [True] * 4
    assert (long_name in text) == (len(long_name) < 20)


def test_the_table_of_tasks_has_no_column_without_values() -> None:
    lengths = Lengths(median=12, percentile_95=40, longest=50, max_length=128, truncated=0)
    console = Console(width=80, file=io.StringIO())
    print_report(QualityReport([TaskSummary("stars", "regression", {"train": 12}, {}, lengths)], []), console)
    head = console.file.getvalue().split("stars")[0]  # type: ignore[attr-defined]
    assert head.split()[:6] == ["task", "kind", "train", "tokens", "longest", "cut"]


def test_the_json_has_everything(tmp_path: Path, backbone: str) -> None:
    report = hostile_report(tmp_path, backbone)
    values = json.loads(as_json(report))
    assert values.keys() == {"verdict", "worst", "tasks", "findings", "notes"}
    assert [finding["check"] for finding in values["findings"]] == [finding.check for finding in report.findings]
    assert values["tasks"][0]["lengths"]["max_length"] == 64


def test_long_and_broken_texts_are_shortened() -> None:
    assert excerpt("a " * 500) == "a " * 59 + "a…"
    assert excerpt("line\nof  text\x00") == "line of text\\x00"
    assert len(excerpt("x" * 1000)) == 120


def test_a_recipe_keeps_its_settings(tmp_path: Path, backbone: str) -> None:
    task(tmp_path, train=clean("train"))
    values = f"""
backbone: {backbone}
data: {{max_length: 33, on_bad_row: skip, k_per_label: 2}}
training: {{max_steps: 1}}
tasks: [{{name: mood, source: {{path: mood-train.jsonl, held_out: {{test: {{size: 4}}}}}}}}]
"""
    (tmp_path / "recipe.yaml").write_text(values)
    entries, settings = read_input(tmp_path / "recipe.yaml", ["seed=3"])
    assert settings == CheckSettings(backbone, 33, "skip", 3)
    assert check_tasks(entries, settings).tasks[0].rows == {"train": 16, "test": 4}
    with pytest.raises(DataError, match="--text, --label, --kind and --delimiter are for data files"):
        read_input(tmp_path / "recipe.yaml", label="label")
    with pytest.raises(RecipeError, match="--set changes settings of a recipe"):
        read_input(tmp_path / "mood-train.jsonl", ["seed=3"])
