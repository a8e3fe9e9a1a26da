"""Recipes and tasks: what is accepted, what is refused, and how the message reads."""

from __future__ import annotations

import json
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from hyperadapters.config import (
    DataConfig,
    HeldOut,
    ModelConfig,
    Recipe,
    Source,
    Task,
    TaskEntry,
    TrainingConfig,
    load_recipe,
    parse,
)
from hyperadapters.config.reading import load_yaml
from hyperadapters.config.sweep import Range, SweepConfig
from hyperadapters.errors import RecipeError, TaskError

RECIPES = Path(__file__).parents[2] / "recipes"


def one_task(name: str = "mood", **settings: Any) -> dict[str, Any]:
    return {"name": name, "source": {"path": "mood.jsonl"}, **settings}


def values_of(**changes: Any) -> dict[str, Any]:
    return {"backbone": "tiny", "training": {"max_steps": 10}, "tasks": [one_task()], **changes}


def recipe(**changes: Any) -> Recipe:
    return parse(Recipe, values_of(**changes))


def write(path: Path, **values: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
    return path


def faults_of(**changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        recipe(**changes)
    return str(caught.value).splitlines()


# Keys and types


@pytest.mark.parametrize(
    ("changes", "place", "meant"),
    [
        ({"sed": 1}, "sed", "seed"),
        ({"model": {"adapter_dimm": 8}}, "model.adapter_dimm", "adapter_dim"),
        ({"training": {"max_step": 8, "max_steps": 8}}, "training.max_step", "max_steps"),
        ({"tasks": [one_task(feilds=["text"])]}, "tasks.0.feilds", "fields"),
        ({"tasks": [one_task(source={"path": "x", "colums": {}})]}, "tasks.0.source.colums", "columns"),
        (
            {"tasks": [one_task(source={"path": "x", "held_out": {"test": {"from": "train", "size": 1, "sise": 1}}})]},
            "tasks.0.source.held_out.test.sise",
            "size",
        ),
    ],
)
def test_unknown_key_is_named_with_the_nearest_known_one(changes: dict[str, Any], place: str, meant: str) -> None:
    assert f"  {place}: unknown key. Did you mean '{meant}'?" in faults_of(**changes)


def test_unknown_key_that_resembles_nothing_gets_no_suggestion() -> None:
    assert faults_of(zzzzzz=1)[1] == "  zzzzzz: unknown key."


@pytest.mark.parametrize(
    ("changes", "place", "name"),
    [
        ({"tasks": [one_task(label_words={"no": "0"})]}, "tasks.0.label_words", "verbalizer"),
        ({"tasks": [one_task(source={"path": "x", "cut": {}})]}, "tasks.0.source.cut", "held_out"),
        ({"model": {"prototypes_per_task": 3}}, "model.prototypes_per_task", "centroids_per_task"),
        (
            {"model": {"modules": {"layers": "h", "feed_forward": "mlp", "width": 8}}},
            "model.modules.width",
            "hidden_size",
        ),
    ],
)
def test_key_of_an_earlier_version_is_named_with_its_new_name(changes: dict[str, Any], place: str, name: str) -> None:
    assert f"  {place}: this key was renamed; use '{name}' instead" in faults_of(**changes)


@pytest.mark.parametrize(("value", "name"), [("text", "text_features"), ("texts", "pair_features")])
def test_value_of_an_earlier_version_is_named_with_its_new_name(value: str, name: str) -> None:
    expected = f"  model.head_inputs: the value '{value}' was renamed; use '{name}' instead"
    assert faults_of(model={"head_inputs": value}) == ["Recipe: 1 fault", expected]


def test_renamed_key_is_reported_together_with_other_faults() -> None:
    faults = faults_of(model={"prototypes_per_task": 3, "adapter_dim": 0}, sed=1)
    assert [fault.split(":")[0].strip() for fault in faults[1:]] == [
        "model.adapter_dim",
        "model.prototypes_per_task",
        "sed",
    ]


def test_renamed_key_is_only_known_where_its_new_name_is() -> None:
    assert "  data.width: unknown key." in faults_of(data={"width": 8})


def test_fields_given_from_python_are_named_with_their_new_names() -> None:
    with pytest.raises(ValidationError, match="this key was renamed; use 'centroids_per_task' instead"):
        ModelConfig(prototypes_per_task=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="the value 'texts' was renamed; use 'pair_features' instead"):
        ModelConfig(head_inputs="texts")  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="this key was renamed; use 'verbalizer' instead"):
        Task(name="mood", labels=("no", "yes"), label_words={"no": "0", "yes": "1"})  # type: ignore[call-arg]
    with pytest.raises(TaskError, match="label_words: this key was renamed; use 'verbalizer' instead"):
        Task.classification("mood", ["no", "yes"], label_words={"no": "0", "yes": "1"})


@pytest.mark.parametrize(
    ("changes", "place", "found"),
    [
        ({"seed": "many"}, "seed", "'many'"),
        ({"seed": -1}, "seed", "-1"),
        ({"seed": 2**32}, "seed", "4294967296"),
        ({"backbone": ["a"]}, "backbone", "['a']"),
        ({"data": {"fraction": 1.5}}, "data.fraction", "1.5"),
        ({"data": {"n_train": 0}}, "data.n_train", "0"),
        ({"data": {"sampling": "fair"}}, "data.sampling", "'fair'"),
        ({"model": {"temperature": 0}}, "model.temperature", "0"),
        ({"model": {"temperature": math.inf}}, "model.temperature", "inf"),
        ({"tasks": [one_task(kind="ranking")]}, "tasks.0.kind", "'ranking'"),
        ({"tasks": [one_task(step=0)]}, "tasks.0.step", "0"),
    ],
)
def test_wrong_value_is_reported_with_its_place_and_itself(changes: dict[str, Any], place: str, found: str) -> None:
    header, fault = faults_of(**changes)
    assert header == "Recipe: 1 fault"
    assert fault.startswith(f"  {place}: ")
    assert fault.endswith(f"; found {found}")


def test_missing_keys_are_named() -> None:
    with pytest.raises(RecipeError) as caught:
        parse(Recipe, {"tasks": [{"name": "mood"}]})
    assert sorted(str(caught.value).splitlines()[1:]) == [
        "  backbone: required, not given",
        "  tasks.0.source: required, not given",
        "  training: required, not given",
    ]


def test_all_faults_are_reported_together() -> None:
    header, *faults = faults_of(
        sed=1, model={"adapter_dim": 0}, data={"max_length": 1}, tasks=[one_task(), one_task("b", metrics=["bleu"])]
    )
    assert header == "Recipe: 4 faults"
    assert [fault.split(":")[0].strip() for fault in faults] == [
        "model.adapter_dim",
        "data.max_length",
        "tasks.1",
        "sed",
    ]


def test_recipe_cannot_be_changed_after_it_was_checked() -> None:
    found = recipe()
    with pytest.raises(ValueError, match="frozen"):
        found.seed = 3  # type: ignore[misc]


# Tasks


def test_recipe_without_tasks_is_refused() -> None:
    with pytest.raises(RecipeError, match="expected at least one task, found none"):
        recipe(tasks=[])


def test_duplicate_task_names_are_refused() -> None:
    with pytest.raises(RecipeError, match="task names must be different from each other, found 'mood' 2 times"):
        recipe(tasks=[one_task(), one_task("other"), one_task()])


@pytest.mark.parametrize("name", ["a/b", "a\\b", "a\nb", "a\tb", "a\x00b", "a\x1b[31mb", "a\u202eb", ".", ".."])
def test_task_name_with_path_or_control_characters_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="must not contain path separators or control characters"):
        Task.classification(name, ["no", "yes"])


@pytest.mark.parametrize("name", ["", " ", " mood", "mood ", "m" * 101])
def test_task_name_that_is_empty_padded_or_endless_is_refused(name: str) -> None:
    with pytest.raises(TaskError, match="expected 1 to 100 characters without spaces at the ends"):
        Task.classification(name, ["no", "yes"])


@pytest.mark.parametrize("name", ["mood", "mood of the day", "Stimmung-äöü", "気分", "v1.2_mood"])
def test_ordinary_task_names_are_kept(name: str) -> None:
    assert Task.classification(name, ["no", "yes"]).name == name


@pytest.mark.parametrize("kind", ["regression", "text-to-text"])
def test_task_without_classes_refuses_labels(kind: str) -> None:
    with pytest.raises(RecipeError, match=f"a {kind} task has no labels, found 2"):
        recipe(tasks=[one_task(kind=kind, labels=["no", "yes"])])


def test_single_label_is_refused() -> None:
    with pytest.raises(TaskError, match="at least two labels, found only 'yes'"):
        Task.classification("mood", ["yes"])


def test_equal_labels_are_refused() -> None:
    with pytest.raises(TaskError, match="labels must be different"):
        Task.classification("mood", ["yes", "no", "yes"])


def test_labels_that_yaml_read_as_something_else_are_refused() -> None:
    values = yaml.safe_load("{name: mood, labels: [no, yes], source: {path: x.jsonl}}")
    with pytest.raises(RecipeError, match=r"labels must be strings, found \[False, True\]; put them in"):
        recipe(tasks=[values])


def test_metric_of_the_wrong_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(TaskError, match=r"Unknown metric of a regression task 'pearsn'\. Did you mean 'pearson'\?"):
        Task.regression("score", metrics=["pearsn"])


def test_f1_of_three_labels_is_refused() -> None:
    with pytest.raises(TaskError, match="f1 requires two labels, found 3; use macro_f1"):
        Task.classification("mood", ["a", "b", "c"], metrics=["f1"])


@pytest.mark.parametrize(
    ("task", "metric"),
    [
        (Task.classification("a", ["no", "yes"]), "accuracy"),
        (Task.regression("b"), "pearson"),
        (Task.text_to_text("c"), "exact_match"),
    ],
)
def test_default_metric_follows_the_kind(task: Task, metric: str) -> None:
    assert task.main_metric == metric


@pytest.mark.parametrize("fields", [["text_pair"], ["text_pair", "text"], ["text", "text"], []])
def test_fields_are_one_text_or_a_pair(fields: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"fields must be \[text\] or \[text, text_pair\]"):
        recipe(tasks=[one_task(fields=fields)])


@pytest.mark.parametrize(
    "template",
    [
        "{text} {title}",
        "{text} {text_pair}",
        "{text} {}",
        "{text} {0}",
        "{text",
        "{text}}",
        "{text:{width}}",
        "{text:d}",
    ],
)
def test_template_that_names_an_unknown_field_or_is_broken_is_refused(template: str) -> None:
    with pytest.raises(TaskError, match=r"template may only use \{text\}"):
        Task.text_to_text("mood", template=template)


@pytest.mark.parametrize("template", ["{text} {text.upper_}", "{text} {text[word]}"])
def test_template_that_reaches_into_a_field_is_refused(template: str) -> None:
    with pytest.raises(TaskError, match="template"):
        Task.text_to_text("mood", template=template)


def test_template_that_reads_attributes_of_python_objects_is_refused() -> None:
    with pytest.raises(TaskError, match="template"):
        Task.text_to_text("mood", template="{text} {text.__class__.__mro__}")


def test_template_that_leaves_out_a_field_is_refused() -> None:
    with pytest.raises(TaskError, match=r"template does not use \{text_pair\}"):
        Task.text_to_text("mood", fields=["text", "text_pair"], template="only {text}")


def test_verbalizer_must_cover_the_labels() -> None:
    with pytest.raises(TaskError, match=r"verbalizer must have one text for each of \['no', 'yes'\]"):
        Task.classification("mood", ["no", "yes"], verbalizer={"no": "0"})


def test_verbalizer_with_equal_texts_is_refused() -> None:
    with pytest.raises(TaskError, match="verbalizer"):
        Task.classification("mood", ["no", "yes"], verbalizer={"no": "0", "yes": "0"})


# Settings that exclude each other


@pytest.mark.parametrize("training", [{}, {"max_steps": 10, "num_train_epochs": 2}])
def test_training_length_is_given_exactly_once(training: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="training: expected exactly one of max_steps, num_train_epochs"):
        recipe(training=training)


@pytest.mark.parametrize("training", [{"max_steps": 10}, {"num_train_epochs": 0.5}])
def test_training_length_is_steps_or_epochs(training: dict[str, Any]) -> None:
    assert recipe(training=training).training == TrainingConfig(**training)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, ".inf", "1e999"])
@pytest.mark.parametrize("model", [ModelConfig, DataConfig, TrainingConfig, Task])
def test_numbers_that_are_not_finite_are_refused(model: type[BaseModel], value: float | str) -> None:
    numbers = [name for name, field in model.model_fields.items() if re.search(r"\bfloat\b", str(field.annotation))]
    assert numbers
    for name in numbers:
        with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
            model.model_validate({name: value})


@pytest.mark.parametrize(
    "data",
    [
        {"n_train": 10, "fraction": 0.5},
        {"n_train": 10, "k_per_label": 4},
        {"fraction": 0.5, "k_per_label": 4},
        {"n_train": 10, "fraction": 0.5, "k_per_label": 4},
    ],
)
def test_subset_size_is_given_at_most_once(data: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="data: expected at most one of n_train, fraction, k_per_label"):
        recipe(data=data)


def test_subset_size_may_be_left_out() -> None:
    assert recipe().data == DataConfig()


# Sources


@pytest.mark.parametrize("source", [{}, {"columns": {"text": "sentence"}}])
def test_source_without_an_origin_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.0\.source: expected exactly one of path, dataset, demo; found none"):
        recipe(tasks=[one_task(source=source)])


def test_source_with_two_origins_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"found \['path', 'dataset'\]"):
        parse(Source, {"path": "a.jsonl", "dataset": "glue"})


@pytest.mark.parametrize("extra", [{"subset": "sst2"}, {"splits": {"train": "train"}}])
def test_settings_of_a_data_set_need_one(extra: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="subset and splits are only for dataset, which is not given"):
        parse(Source, {"path": "a.jsonl", **extra})


@pytest.mark.parametrize("size", [0, -1, math.inf, math.nan])
def test_size_of_a_cut_is_a_positive_finite_number(size: float) -> None:
    with pytest.raises(RecipeError, match="size"):
        parse(HeldOut, {"from": "train", "size": size})


# Files


def test_recipe_file_is_read(tmp_path: Path) -> None:
    found = load_recipe(write(tmp_path / "a.yaml", **values_of(seed=3)))
    assert found.seed == 3
    assert [task.name for task in found.tasks] == ["mood"]


def test_fault_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", **values_of(sed=3))
    with pytest.raises(RecipeError, match=r"a\.yaml: 1 fault\n  sed: unknown key"):
        load_recipe(path)


def test_missing_file_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    write(tmp_path / "helpdesk.yaml", **values_of())
    with pytest.raises(RecipeError, match=r"helpdsk\.yaml: no such recipe\. Did you mean '.*helpdesk\.yaml'\?"):
        load_recipe(tmp_path / "helpdsk.yaml")


def test_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"expected a recipe, found a folder; a run has its recipe in recipe\.yaml"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "backbone: Zürich".encode("latin-1"),
        b"backbone: [tiny",
        b"backbone: 'tiny",
        b"\x00",
        b"{[a]: b}",
        b"backbone: 2024-13-45",
    ],
    ids=["latin-1", "open bracket", "open quote", "binary", "key that is a list", "date that is none"],
)
def test_file_that_is_no_utf8_yaml_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"a\.yaml: not a readable UTF-8 YAML file"):
        load_recipe(path)


@pytest.mark.parametrize(("content", "kind"), [("- a\n- b\n", "list"), ("just words", "str"), ("", "NoneType")])
def test_file_without_keys_is_refused(tmp_path: Path, content: str, kind: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=rf"a\.yaml: expected keys and values, found {kind}"):
        load_recipe(path)


def test_file_with_a_python_object_is_refused_and_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "a.yaml"
    path.write_text(
        f"backbone: !!python/object/apply:pathlib.Path.mkdir [!!python/object/apply:pathlib.Path [{trace}]]"
    )
    with pytest.raises(
        RecipeError, match=r"the tag '.*python/object/apply:pathlib.Path.mkdir' is not supported; remove"
    ):
        load_recipe(path)
    assert not trace.exists()


@pytest.mark.parametrize("tag", ["int", "float", "bool", "timestamp", "binary", "set", "omap", "seq"])
def test_tags_of_yaml_other_than_str_are_refused(tag: str) -> None:
    """Several of them raise errors of Python in PyYAML if their value is not what they say, such as `!!int ""`."""
    with pytest.raises(yaml.YAMLError, match=f"the tag '.*{tag}' is not supported; remove it"):
        load_yaml(f"seed: !!{tag} x")
    assert load_yaml("name: !!str 1") == {"name": "1"}


def test_yaml_is_read_up_to_the_maximum_depth() -> None:
    deepest = "[" * 100 + "]" * 100
    assert load_yaml(deepest) == json.loads(deepest)
    for text in (f"[{deepest}]", "[" * 100_000, "{a: " * 100_000, "- " * 100_000, f"a: &a {deepest[1:-1]}\nb: [*a]"):
        with pytest.raises(yaml.YAMLError, match="expected at most 100 levels of nested keys and lists, found more"):
            load_yaml(text)


def test_aliases_are_counted_as_what_they_stand_for() -> None:
    assert load_yaml("a: &a {b: 1}\nc: [*a, *a]\nd: {<<: *a, e: 2}") == {
        "a": {"b": 1},
        "c": [{"b": 1}, {"b": 1}],
        "d": {"b": 1, "e": 2},
    }
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join(10 * [f'*a{n - 1}'])}]" for n in range(1, 10)]
    merged = ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, 40)]
    for text in ("\n".join(lines), "\n".join(merged)):
        with pytest.raises(yaml.YAMLError, match="expected at most 1000000 keys and values, found more"):
            load_yaml(text)


def test_an_alias_of_what_contains_it_is_refused() -> None:
    for text in ("&a [*a]", "a: &a {b: [*a]}", "&a {<<: *a}"):
        with pytest.raises(yaml.YAMLError, match=r"the alias \*a stands for a value that contains it; remove it"):
            load_yaml(text)


def test_a_recipe_of_any_length_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("#" + "x" * 10_000_000)
    for long in (path, Path("/dev/zero")):
        with pytest.raises(RecipeError, match=r"expected at most 10000000 characters, found more; split the file"):
            load_recipe(long)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\0b", "null"),
        ("n" * 300, "not a readable"),
        ("loop", "not a readable"),
        ("/dev/zero", "no file"),
        (".", "no file"),
        ("pipe", "no file"),
    ],
)
def test_extends_of_what_is_no_file_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "a.yaml", extends=name))


def test_names_that_are_no_paths_are_read_as_they_are(tmp_path: Path) -> None:
    for name in ("./a\0b", ".\ud800", "./" + "n" * 300):
        (tmp_path / "a.yaml").write_text(json.dumps(values_of(backbone=name)))
        with suppress(RecipeError):
            assert load_recipe(tmp_path / "a.yaml").backbone.endswith(name[2:])


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"backbone": "\ud800"}, "as a whole: backbone"),
        ({"tasks": [one_task(labels=["a", "\udcff"])]}, "tasks.0: labels"),
        ({"tasks": [one_task(labels=["a", "b"], verbalizer={"a": "c", "b": "\ud800"})]}, "tasks.0: verbalizer"),
        ({"tasks": [one_task(template="{text} \ud800")]}, "tasks.0: template"),
        ({"tasks": [one_task(source={"path": "a", "label_names": {"\ud800": "b"}})]}, "tasks.0.source: label_names"),
    ],
)
def test_texts_that_cannot_be_written_are_refused(changes: dict[str, Any], place: str) -> None:
    assert f"  {place}: expected valid Unicode, found " in faults_of(**changes)[1]


WRONG: list[Any] = [3, -1.5, True, "x", [], {}, [[1]], {"a": 3}, {"a": {}}, {"a": [[1]]}, {"a": {"low": 2, "high": 1}}]
"""Values of which each key of a recipe refuses some."""


@pytest.mark.parametrize(
    "model", [ModelConfig, DataConfig, TrainingConfig, TaskEntry, Source, HeldOut, SweepConfig, Range]
)
def test_place_of_a_fault_consists_of_keys_and_has_one_fault(model: type[BaseModel]) -> None:
    for field in model.model_fields:
        refused = 0
        for value in WRONG:
            with suppress(RecipeError):
                parse(model, {field: value})
                continue
            with pytest.raises(RecipeError) as caught:
                parse(model, {field: value})
            message = str(caught.value)
            places = re.findall(r"^  (.*?): (?!unknown key)", message, re.MULTILINE)
            assert all(re.fullmatch(r"\w+(\.\w+)*|as a whole", place) for place in places), message
            assert not {"int", "float", "str", "bool"} & {key for place in places for key in place.split(".")}, message
            assert len(set(places)) == len(places), message
            refused += any(re.match(rf"{field}\b", place) for place in places)
        assert refused


@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "[" + "x, " * 1000 + "]"])
def test_a_value_that_is_too_large_to_show_is_shortened(value: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", **values_of())
    for key in ("backbone", "seed", "model.preset", "tasks", "training.optimizer"):
        with pytest.raises(RecipeError, match=rf"  {key}(\.0)?: .*; found ") as caught:
            load_recipe(path, [f"{key}={value}"])
        assert len(str(caught.value)) < 10_000


def test_an_override_of_any_depth_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", **values_of())
    with pytest.raises(RecipeError, match=r"seed: .*; found a value of type dict that is too large to show"):
        load_recipe(path, ["seed" + ".a" * 100_000 + "=1"])


def test_relative_paths_are_resolved_against_the_recipe(tmp_path: Path) -> None:
    sources = [
        {"path": "data/{split}.jsonl"},
        {"path": {"train": "a.csv", "test": "../b.csv"}},
        {"dataset": "./rows"},
        {"dataset": "nyu-mll/glue"},
    ]
    tasks = [one_task(f"t{number}", source=source) for number, source in enumerate(sources)]
    found = load_recipe(write(tmp_path / "sub/a.yaml", **values_of(backbone="../model", tasks=tasks)))
    assert found.backbone == str(tmp_path / "model")
    assert found.tasks[0].source.path == str(tmp_path / "sub/data/{split}.jsonl")
    paths = found.tasks[1].source.path
    assert isinstance(paths, dict)
    assert {split: Path(path).resolve() for split, path in paths.items()} == {
        "train": tmp_path / "sub/a.csv",
        "test": tmp_path / "b.csv",
    }
    assert found.tasks[2].source.dataset == str(tmp_path / "sub/rows")
    assert found.tasks[3].source.dataset == "nyu-mll/glue"


def test_absolute_paths_and_hub_names_stay(tmp_path: Path) -> None:
    tasks = [one_task(source={"path": "/data/a.jsonl"})]
    found = load_recipe(write(tmp_path / "a.yaml", **values_of(backbone="google/t5", tasks=tasks)))
    assert (found.backbone, found.tasks[0].source.path) == ("google/t5", "/data/a.jsonl")


def test_a_folder_beside_the_recipe_needs_no_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub/backbones/bert").mkdir(parents=True)
    (tmp_path / "sub/rows").mkdir()
    (tmp_path / "google/t5").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    tasks = [one_task(source={"dataset": "rows"})]
    found = load_recipe(write(tmp_path / "sub/a.yaml", **values_of(backbone="backbones/bert", tasks=tasks)))
    assert found.backbone == str(tmp_path / "sub/backbones/bert")
    assert found.tasks[0].source.dataset == str(tmp_path / "sub/rows")
    for name in ("google/t5", "backbones/other", "n" * 300):
        assert load_recipe(write(tmp_path / "sub/b.yaml", **values_of(backbone=name))).backbone == name


# extends


def test_extending_recipe_replaces_and_adds_single_settings(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **values_of(seed=1, model={"adapter_dim": 8, "hidden_dim": 16}))
    found = load_recipe(write(tmp_path / "a.yaml", extends="base.yaml", model={"hidden_dim": 4}, data={"n_train": 5}))
    assert (found.seed, found.model.adapter_dim, found.model.hidden_dim, found.data.n_train) == (1, 8, 4, 5)


def test_extending_recipe_replaces_the_list_of_tasks(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **values_of(tasks=[one_task("a"), one_task("b")]))
    found = load_recipe(write(tmp_path / "a.yaml", extends="base.yaml", tasks=[one_task("c")]))
    assert [task.name for task in found.tasks] == ["c"]


def test_extends_works_over_several_files(tmp_path: Path) -> None:
    write(tmp_path / "one.yaml", **values_of(seed=1))
    write(tmp_path / "two.yaml", extends="one.yaml", seed=2)
    assert load_recipe(write(tmp_path / "three.yaml", extends="two.yaml")).seed == 2


def test_paths_of_an_extended_recipe_are_relative_to_the_file_that_holds_them(tmp_path: Path) -> None:
    write(tmp_path / "base/base.yaml", **values_of(backbone="./model"))
    found = load_recipe(write(tmp_path / "top/a.yaml", extends="../base/base.yaml"))
    assert found.backbone == str(tmp_path / "base/model")
    assert found.tasks[0].source.path == str(tmp_path / "base/mood.jsonl")


def test_recipes_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", extends="b.yaml")
    write(tmp_path / "b.yaml", extends="a.yaml")
    with pytest.raises(RecipeError, match=r"a\.yaml: extends itself through .*a\.yaml -> .*b\.yaml"):
        load_recipe(tmp_path / "a.yaml")


def test_recipes_that_extend_each_other_across_folders_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "one/a.yaml", extends="../two/b.yaml")
    write(tmp_path / "two/b.yaml", extends="../one/a.yaml")
    with pytest.raises(RecipeError, match="extends itself through"):
        load_recipe(tmp_path / "one/a.yaml")


def test_extended_file_that_is_missing_is_named(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", **values_of())
    path = write(tmp_path / "a.yaml", extends="bas.yaml")
    with pytest.raises(RecipeError, match=r"bas\.yaml: no such recipe\. Did you mean '.*base\.yaml'"):
        load_recipe(path)


def test_extends_must_be_a_file_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.yaml", extends=["b.yaml"])
    with pytest.raises(RecipeError, match=r"extends must name a recipe file; found \['b\.yaml'\]"):
        load_recipe(path)


# Overrides


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    return write(tmp_path / "a.yaml", **values_of(seed=1, data={"n_train": 10}))


def test_overrides_replace_and_add_settings(recipe_file: Path) -> None:
    found = load_recipe(recipe_file, ["seed=7", "data.n_validation=3", "model.adapter_norm_input=false"])
    assert (found.seed, found.data.n_train, found.data.n_validation) == (7, 10, 3)
    assert found.model.adapter_norm_input is False


def test_override_with_null_takes_a_setting_out(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["data.n_train=null", "data.fraction=0.5"]).data == DataConfig(fraction=0.5)


def test_last_override_of_a_setting_wins(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ("seed=7", "seed=8")).seed == 8


def test_overrides_come_after_extends(tmp_path: Path, recipe_file: Path) -> None:
    top = write(tmp_path / "top.yaml", extends=recipe_file.name, seed=2)
    assert load_recipe(top, ["seed=3"]).seed == 3


def test_override_may_contain_equals_signs(recipe_file: Path) -> None:
    assert load_recipe(recipe_file, ["backbone=a=b"]).backbone == "a=b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", r"override 'seed': expected key\.of\.setting=value"),
        ("seed.deep=1", "override 'seed.deep=1': 'seed' has a value and no settings"),
        ("tasks.0.name=x", "'tasks' has a value and no settings"),
        ("modle.adapter_dim=3", r"modle: unknown key\. Did you mean 'model'\?"),
        ("data.n_trian=3", r"data\.n_trian: unknown key\. Did you mean 'n_train'\?"),
        ("seed=soon", r"seed: .*found 'soon'"),
        ("=3", "unknown key"),
        ("seed=[1", r"override 'seed=\[1'"),
        ("backbone=2024-13-45", "override 'backbone=2024-13-45'"),
    ],
)
def test_wrong_override_is_refused(recipe_file: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe_file, [override])


# The recipes of this repository


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipe_of_this_repository_loads(path: Path) -> None:
    sizes = {
        "demo": 6,
        "local-glue": 12,
        "local-plus": 12,
        "local-transfer": 10,
        "local-transfer-plus": 10,
    }
    assert len(load_recipe(path).tasks) == sizes[path.stem]


def test_repository_has_recipes() -> None:
    assert {"demo.yaml", "local-glue.yaml"} <= {path.name for path in RECIPES.glob("*.yaml")}


def test_enumerated_values_get_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="Did you mean 'official'"):
        parse(ModelConfig, {"preset": "oficial"})


def test_settings_of_another_kind_of_task_are_refused() -> None:
    with pytest.raises(TaskError, match="a step is only for regression tasks"):
        Task.classification("a", ["x", "y"], step=0.5)
    with pytest.raises(TaskError, match="a verbalizer is only for classification tasks"):
        Task.regression("a", verbalizer={"x": "y"})


def test_label_names_are_compared_as_texts() -> None:
    source = parse(Source, {"path": "a.csv", "label_names": {0: "bad", True: "good"}})
    assert source.label_names == {"0": "bad", "true": "good"}


@pytest.mark.parametrize(
    ("place", "changes"),
    [
        ("training.learning_rate", {"training": {"max_steps": 1, "learning_rate": True}}),
        ("training.label_smoothing", {"training": {"max_steps": 1, "label_smoothing": False}}),
        ("data.fraction", {"data": {"fraction": True}}),
        ("model.temperature", {"model": {"temperature": True}}),
        ("tasks.0.step", {"tasks": [one_task(kind="regression", step=True)]}),
    ],
)
def test_truth_value_is_no_number(place: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=rf"{place}: expected a number, found (True|False)"):
        parse(Recipe, values_of(**changes))


def test_number_may_be_written_as_yaml_does_not_read_it() -> None:
    assert recipe(training={"max_steps": 1, "learning_rate": "1e-3"}).training.learning_rate == 1e-3


def test_key_given_twice_is_refused_with_its_line(tmp_path: Path, recipe_file: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\ntraining:\n  max_steps: 1\n  max_steps: 2\n")
    with pytest.raises(RecipeError, match=r"(?s)'max_steps' is given twice; remove one of them.*line 4, column 3"):
        load_recipe(path)
    with pytest.raises(RecipeError, match="'max_steps' is given twice"):
        load_recipe(recipe_file, ["training={max_steps: 1, max_steps: 2}"])


def test_merge_keys_of_yaml_may_be_replaced() -> None:
    text = "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, y: 3}\n"
    assert load_yaml(text) == {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 2, "y": 3}}


def test_labels_in_yaml_mean_what_is_written() -> None:
    read = load_yaml(
        "label_names: {yes: positive, no: on, 001: first, true: t, null: n}\nlabels: [yes, no]\nbf16: true"
    )
    assert read == {
        "label_names": {"yes": "positive", "no": "on", "001": "first", "true": "t", "null": "n"},
        "labels": ["yes", "no"],
        "bf16": True,
    }


@pytest.mark.parametrize("mode", ["python", "json"])
@pytest.mark.parametrize("option", ["", "exclude_unset", "exclude_defaults", "exclude_none", "by_alias"])
def test_recipe_is_the_same_when_dumped_and_parsed(mode: Literal["python", "json"], option: str) -> None:
    task = one_task(source={"path": "a.csv", "delimiter": ";", "held_out": {"test": {"from": "train", "size": 0.1}}})
    given = recipe(tasks=[task], training={"max_steps": 1, "max_grad_norm": 0.5})
    options = {option: True} if option else {}
    assert parse(Recipe, given.model_dump(mode=mode, **options)) == given
    assert Recipe.model_validate_json(given.model_dump_json(**options)) == given


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "a.jsonl", "delimiter": ";"}, "delimiter is only for a path that ends in .csv or .tsv"),
        ({"demo": "message_spam", "delimiter": ";"}, "delimiter is only for a path that ends in .csv or .tsv"),
        ({"path": "a.csv", "delimiter": ";;"}, "at most 1 character"),
        ({"path": "a.csv", "delimiter": '"'}, "must not be a quotation mark or a line end"),
    ],
)
def test_delimiter_that_does_not_fit_is_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        parse(Recipe, values_of(tasks=[one_task(source=source)]))


# Tasks without rows


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"name": "new", "labels": ["1", "2"]}, "'new': expected a classification task of single texts with labels"),
        ({"name": "new", "kind": "multi-label", "labels": ["a", "b"]}, "'new': expected a classification task"),
        ({"name": "new", "kind": "regression"}, "'new': expected a classification task"),
        ({"name": "mood", "labels": ["a", "b"]}, "task names must be different from each other, found 'mood' 2 times"),
    ],
)
def test_described_tasks_that_cannot_be_added_are_refused(task: dict[str, Any], message: str) -> None:
    assert message in faults_of(described_tasks=[task])[1]


def test_labels_with_descriptions_are_read_from_a_recipe(tmp_path: Path) -> None:
    labels = {"no": "something else", "yes": "the customer wants the money back"}
    values = values_of(tasks=[one_task(labels=labels)], described_tasks=[{"name": "refunds", "labels": labels}])
    found = load_recipe(write(tmp_path / "recipe.yaml", **values))
    assert [task.descriptions for task in (*found.tasks, *found.described_tasks)] == [labels, labels]
    assert found.tasks[0].task.labels == ("no", "yes")
    assert recipe(**found.model_dump(mode="json")) == found
