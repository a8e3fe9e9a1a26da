"""What the fuzz tests try: for each reader of files and names from outside, its inputs and how they are read.

A target is prepared in an empty folder, which is the working directory meanwhile, and gives the inputs and a function
that checks one of them. The inputs start from valid files, so that many of them pass the first checks.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fuzzing import EDITS, REMOVED, SCALARS, TEXTS, VALUES, changed, changes_of, edited, files_in, only_own_errors
from helpers import HEAD_TASKS, PAIR_TASKS, lived_in, make_model
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor
from written_runs import result_rows, run_values, write_values

from hyperadapters.checkpoints.format import load_model, read_checkpoint, save_model, stored_digest
from hyperadapters.checkpoints.task_records import set_states
from hyperadapters.checkpoints.task_store import TaskStore
from hyperadapters.checkpoints.task_store_files import TASK, record_digest
from hyperadapters.config import DataConfig, Task, TaskEntry, load_recipe, parse
from hyperadapters.data.loading import load_task
from hyperadapters.data.memory import read_train_and_eval_data
from hyperadapters.data.schema import infer_schema
from hyperadapters.data.sources import Row, iterate_file
from hyperadapters.errors import HyperAdaptersError
from hyperadapters.interop.peft import export_peft, import_peft
from hyperadapters.report.charts import Report
from hyperadapters.report.plotly_figures import plotly_figure
from hyperadapters.report.result_rows import read_rows, rows_report
from hyperadapters.report.run_report import run_report
from hyperadapters.report.runs import read_run

Inputs = st.SearchStrategy[Any]
Prepared = tuple[Inputs, Callable[[Any], None]]


@dataclass(frozen=True)
class Target:
    """A reader of something from outside.

    Attributes:
        prepare: Function that prepares the target in a folder.
        inputs: Number of inputs in the tests.
    """

    prepare: Callable[[Path], Prepared]
    inputs: int


# Recipes

RECIPE = """\
backbone: some/model
seed: 3
model: &model {preset: plus, adapter_dim: 8, modules: {layers: a.b, feed_forward: c}}
data: {n_train: 5, sampling: temperature, temperature: 2}
training: {max_steps: 4, learning_rate: 1e-3}
tasks:
  - name: mood
    labels: ["no", "yes"]
    template: "is {text} good?"
    verbalizer: {"no": bad, "yes": good}
    source:
      path: "{split}.csv"
      columns: {text: sentence}
      label_names: {0: "no", 1: "yes"}
      held_out: {validation: {from: train, size: 0.1}}
      delimiter: ";"
  - {name: size, kind: regression, step: 0.5, source: {path: {train: a.jsonl, test: b.jsonl}}}
  - {name: topic, fields: [text, text_pair], source: {dataset: ./data, subset: en, splits: {train: train}}}
  - {catalogue: glue/rte, source: {where: {genre: news}, columns: {text: "{parts[0]} of {sentence1}"}}}
sweep: {cases: [{model.codes: trunk}, {}], grid: {seed: [1, 2]}}
"""
RECIPE_VALUES: dict[str, Any] = {
    "backbone": "some/model",
    "seed": 3,
    "model": {"preset": "plus", "adapter_dim": 8, "modules": {"layers": "a.b", "feed_forward": "c"}},
    "data": {"n_train": 5, "sampling": "temperature", "temperature": 2},
    "training": {"max_steps": 4, "learning_rate": "1e-3"},
    "tasks": [
        {
            "name": "mood",
            "labels": ["no", "yes"],
            "verbalizer": {"no": "bad", "yes": "good"},
            "source": {"path": {"train": "a.csv"}, "label_names": {"0": "no"}, "delimiter": ";"},
        },
        {
            "name": "size",
            "kind": "regression",
            "step": 0.5,
            "source": {"path": "a.jsonl", "held_out": {"test": {"size": 2}}},
        },
        {"catalogue": "glue/rte", "source": {"where": {"genre": "news"}}},
    ],
    "sweep": {"ranges": {"seed": {"low": 1, "high": 9}, "model.codes": ["trunk"]}, "trials": 2},
}
SETTINGS = st.sampled_from(
    ["seed", "model", "model.adapter_dim", "tasks", "training.max_steps", "a.b.c", "data", "..", ""]
)
OVERRIDES = st.tuples(st.one_of(SETTINGS, TEXTS), st.sampled_from(["=", "", "=="]), TEXTS).map("".join)


def recipe_of_bytes(folder: Path) -> Prepared:
    def check(content: bytes) -> None:
        _check_recipe(folder, content)

    return st.binary(max_size=60), check


def recipe_of_edits(folder: Path) -> Prepared:
    def check(edits: Any) -> None:
        _check_recipe(folder, edited(RECIPE.encode(), edits))

    load_recipe(_written(folder / "recipe.yaml", RECIPE.encode()))
    return EDITS, check


def recipe_of_values(folder: Path) -> Prepared:
    def check(inputs: tuple[Any, list[str]]) -> None:
        changes, overrides = inputs
        # JSON is YAML, and is written faster; "extends" leads to any file.
        _check_recipe(folder, json.dumps(changed(RECIPE_VALUES, changes)).encode(), overrides)

    load_recipe(_written(folder / "recipe.yaml", json.dumps(RECIPE_VALUES).encode()))
    values = {**RECIPE_VALUES, "extends": None}
    return st.tuples(changes_of(values), st.lists(OVERRIDES, max_size=2)), check


def _check_recipe(folder: Path, content: bytes, overrides: Any = ()) -> None:
    path = _written(folder / "recipe.yaml", content)
    with only_own_errors(folder):
        load_recipe(path, overrides)


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Data

JSON_LINES = b'{"text": "a b", "label": "no"}\n\n{"text": "\\u00e9", "label": 1, "more": [1, {"a": null}]}\n'
CSV = b'\xef\xbb\xbftext,label\r\n"a, ""b""\nc",no\r\nd,yes\r\n\r\n'
TSV = b'text\tlabel\n"a\tb"\tno\n"c" d\tyes\n'
DELIMITERS = st.one_of(st.none(), st.sampled_from([",", "\t", ";", " ", "\0", "\n", '"', "", "ab", "\ud800", "\u00e9"]))


def json_lines(folder: Path) -> Prepared:
    return _of_file(folder / "rows.jsonl", JSON_LINES, st.none())


def csv(folder: Path) -> Prepared:
    return _of_file(folder / "rows.csv", CSV, DELIMITERS)


def tsv(folder: Path) -> Prepared:
    return _of_file(folder / "rows.tsv", TSV, DELIMITERS)


def parquet(folder: Path) -> Prepared:
    return _of_file(folder / "rows.parquet", _parquet(folder), st.none())


def _of_file(path: Path, valid: bytes, delimiters: Inputs) -> Prepared:
    def check(inputs: tuple[Any, str | None]) -> None:
        content, delimiter = inputs
        path.write_bytes(content if isinstance(content, bytes) else edited(valid, content))
        with only_own_errors(path.parent):
            for row in iterate_file(path, delimiter):
                assert all(isinstance(name, str) for name in row.values)

    path.write_bytes(valid)
    assert len(list(iterate_file(path))) == 2
    return st.tuples(st.one_of(EDITS, EDITS, EDITS, st.binary(max_size=60)), delimiters), check


def _parquet(folder: Path) -> bytes:
    table = pa.table({"text": ["a b", "c"], "label": ["no", None], "size": [1.5, 2.0], "list": [[1], []]})
    pq.write_table(table, folder / "valid.parquet")
    return (folder / "valid.parquet").read_bytes()


ROWS = st.lists(
    st.dictionaries(st.one_of(st.sampled_from(["text", "text", "label", "text_pair"]), TEXTS), VALUES, max_size=4),
    max_size=4,
)
KINDS = st.sampled_from(["classification", "multi-label", "regression", "text-to-text"])
SOURCES = st.fixed_dictionaries(
    {},
    optional={
        "columns": st.dictionaries(st.sampled_from(["text", "label"]), TEXTS, max_size=1),
        "label_names": st.dictionaries(TEXTS, TEXTS, max_size=2),
        "held_out": st.just({"test": {"size": 1}}),
    },
)


def schema(folder: Path) -> Prepared:
    columns = st.lists(st.one_of(st.sampled_from(["text", "label", "score"]), TEXTS), max_size=2)
    inputs = st.tuples(ROWS, columns, st.one_of(st.none(), TEXTS), st.one_of(st.none(), KINDS, TEXTS))

    def check(values: Any) -> None:
        rows, texts, label, kind = values
        with only_own_errors(folder):
            found = infer_schema([Row(row, "a row") for row in rows], "a table", texts, label, kind)
            assert found.label in {name for row in rows for name in row}

    return inputs, check


ARROW_TYPES = st.sampled_from(
    [
        *(pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.int8(), pa.uint64(), pa.float16(), pa.float64()),
        *(pa.date32(), pa.date64(), pa.timestamp("s"), pa.timestamp("us", "UTC"), pa.timestamp("ns"), pa.duration("s")),
        *(
            pa.time32("s"),
            pa.time64("ns"),
            pa.decimal128(38, 4),
            pa.decimal256(76, -70),
            pa.null(),
            pa.list_(pa.int8()),
        ),
        *(pa.dictionary(pa.int8(), pa.string()), pa.struct([("a", pa.string())]), pa.map_(pa.string(), pa.int8())),
    ]
)


def rows_of_json(folder: Path) -> Prepared:
    def check(inputs: tuple[list[Any], str, dict[str, Any]]) -> None:
        rows, kind, source = inputs
        _written(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
        _check_task(folder, folder / "rows.jsonl", kind, source)

    return st.tuples(ROWS, KINDS, SOURCES), check


def rows_of_arrow(folder: Path) -> Prepared:
    """Columns of any type with any bits, as another program may have written them."""

    def check(inputs: tuple[Any, Any, bytes, str]) -> None:
        text_type, label_type, bits, kind = inputs
        arrays = [_array(text_type, bits), _array(label_type, bits[::-1])]
        try:
            pq.write_table(pa.table(arrays, names=["text", "label"]), folder / "rows.parquet")
        except (pa.ArrowException, OSError):  # not every array can be written
            return
        _check_task(folder, folder / "rows.parquet", kind, {})

    return st.tuples(ARROW_TYPES, ARROW_TYPES, st.binary(min_size=64, max_size=64), KINDS), check


def _array(kind: Any, bits: bytes) -> Any:
    """Two values of a type, with any bits if the type has a fixed number of them."""
    with suppress(ValueError):
        width = kind.bit_width
        if not pa.types.is_dictionary(kind):
            return pa.Array.from_buffers(kind, 2, [None, pa.py_buffer(bits[: max(1, 2 * width // 8)])])
    if pa.types.is_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.array([bits[:3], bits[3:5]], pa.binary()).view(pa.binary()).cast(kind, safe=False)
    return pa.nulls(2, kind)


def _check_task(folder: Path, path: Path, kind: str, source: dict[str, Any]) -> None:
    values = {"name": "mood", "kind": kind, "source": {"path": str(path), **source}}
    with only_own_errors(folder):
        load_task(parse(TaskEntry, values), 0, DataConfig(), seed=0)


class _Strange:
    """A value of a class that nobody expects."""


def rows_in_memory(folder: Path) -> Prepared:
    strange = st.sampled_from(
        [_Strange(), object, b"a", bytearray(b"a"), {1}, (), torch.ones(2), torch.tensor(1.5), 1j, range(2)]
    )
    values = st.one_of(VALUES, strange)
    keys = st.one_of(st.sampled_from(["text", "text", "label", "text_pair"]), SCALARS, strange.filter(_is_hashable))
    row = st.one_of(st.dictionaries(keys, values, max_size=4), values)
    names = st.sampled_from(["colour", "size", "mood", "same"])
    data = st.one_of(
        st.dictionaries(st.one_of(names, SCALARS), st.one_of(st.lists(row, max_size=3), values), max_size=3), values
    )

    def check(inputs: tuple[Any, Any]) -> None:
        with only_own_errors(folder):
            read_train_and_eval_data([*HEAD_TASKS[:2], *PAIR_TASKS[:1]], *inputs)

    return st.tuples(data, st.one_of(st.none(), data)), check


def _is_hashable(value: Any) -> bool:
    with suppress(TypeError):
        return hash(value) is not None
    return False


# Checkpoints


def checkpoint_of_bytes(folder: Path) -> Prepared:
    """The JSON file is altered, and the weights are whatever belongs to it or not."""
    where, _, _ = _checkpoint(folder)
    content = (where / "hyperadapter.json").read_bytes()

    def check(inputs: Any) -> None:
        _written(where / "hyperadapter.json", inputs if isinstance(inputs, bytes) else edited(content, inputs))
        with only_own_errors(folder):
            stored_digest(where)
        with only_own_errors(folder):
            read_checkpoint(where)

    return st.one_of(EDITS, EDITS, st.binary(max_size=60)), check


def checkpoint_weights(folder: Path) -> Prepared:
    """The weights file is altered, and the checksum in the JSON file is the one that belongs to it."""
    where, values, _ = _checkpoint(folder)
    weights = (where / values["weights"]["file"]).read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")

    def check(inputs: Any) -> None:
        edits, in_header = inputs
        content = edited(weights[:header], edits) + weights[header:] if in_header else edited(weights, edits)
        _written(where / values["weights"]["file"], content)
        _write_config(where, values, content)
        with only_own_errors(folder):
            read_checkpoint(where)

    return st.tuples(EDITS, st.booleans()), check


def checkpoint_values(folder: Path) -> Prepared:
    """Values of the JSON file and tensors are replaced, and all checksums belong to them."""
    where, values, state = _checkpoint(folder)
    backbone = make_model("bert").detach()

    def check(inputs: Any) -> None:
        changes, tensors = inputs
        altered = changed(values, changes)
        if not isinstance(altered, dict):
            altered = {"a": altered}
        _write_checkpoint(where, altered, changed(state, tensors))
        with only_own_errors(folder):
            load_model(where, backbone).detach()
        assert all(parameter.requires_grad for parameter in backbone.parameters())

    described = {key: value for key, value in values.items() if key not in ("weights", "backbone", "library_version")}
    some = st.one_of(st.just([]), changes_of(described))
    return st.tuples(some, st.one_of(st.just([]), _changes_of_tensors(state))), check


def _checkpoint(folder: Path) -> tuple[Path, dict[str, Any], dict[str, Tensor]]:
    """A checkpoint in a folder with another file beside it, its JSON and its tensors."""
    where = folder / "checkpoint"
    save_model(lived_in("bert", centroids_per_task=2), where)
    _written(folder / "beside.json", b"{}")
    values = json.loads((where / "hyperadapter.json").read_bytes())
    del values["tokenizer"]
    state = load((where / values["weights"]["file"]).read_bytes())
    _write_checkpoint(where, values, state)
    assert read_checkpoint(where)[1].keys() == state.keys()
    return where, values, state


def _write_checkpoint(where: Path, values: dict[str, Any], state: dict[str, Any]) -> None:
    described = {key: value for key, value in values.items() if key != "weights"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    weights = save(state, metadata={"config_sha256": digest})
    name = values.get("weights", {}).get("file", "adapters-0123456789ab.safetensors")
    _written(where / name, weights)
    _write_config(where, values, weights)


def _write_config(where: Path, values: dict[str, Any], weights: bytes) -> None:
    if isinstance(values.get("weights"), dict):
        values = {**values, "weights": {**values["weights"], "sha256": hashlib.sha256(weights).hexdigest()}}
    _written(where / "hyperadapter.json", json.dumps(values).encode())


DTYPES = (torch.float32, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
SHAPES = ((), (0,), (1,), (3,), (2, 3), (3, 16), (1, 2, 3), (3, 0, 8), (3, 2, 8), (1, 1, 1, 1))


def _changes_of_tensors(state: dict[str, Tensor]) -> Inputs:
    """Changes of tensors by name: another shape, type or value, none at all, or another name."""
    names, dtypes = st.sampled_from(sorted(state)), st.sampled_from(DTYPES)
    made = st.tuples(st.sampled_from(SHAPES), dtypes, st.sampled_from([0.0, 1.0, float("nan")])).map(
        lambda made: torch.full(made[0], made[2]).to(made[1])
    )
    cast = st.tuples(names, dtypes).map(lambda both: ((both[0],), state[both[0]].to(both[1])))
    texts = TEXTS.map(lambda text: text.encode("utf-8", "replace").decode())  # others cannot be written
    beside = st.tuples(names, texts).map(lambda both: f"{both[0].rpartition('.')[0]}.{both[1]}")
    new = st.tuples(st.one_of(names, beside).map(lambda name: (name,)), st.one_of(made, st.just(REMOVED)))
    return st.lists(st.one_of(cast, new), min_size=1, max_size=3)


# Task stores


def task_store(folder: Path) -> Prepared:
    """Any file of a store is altered, or a record with the checksums that belong to it."""
    model = lived_in("bert", centroids_per_task=2)
    where = folder / "store"
    TaskStore.create(where, model).append(model)
    files = {path.name: path.read_bytes() for path in where.iterdir()}
    rows = np.frombuffer(files["tasks.bin"], TASK)
    record = files["records.bin"][: int(rows[0]["size"])]

    def check(inputs: tuple[str, Any]) -> None:
        name, edits = inputs
        altered = dict(files)
        if name == "a record":
            _put_record(altered, edited(record, edits))
        else:
            altered[name] = edited(files[name], edits)
        for other, content in altered.items():
            _written(where / other, content)
        with only_own_errors(folder):
            store = TaskStore.open(where)
            store.ids(["mood"])
            store.nearest(lambda keys, _: keys[:, :1].T, 2)
            set_states(model, store.states(range(store.config.tasks), model))

    return st.tuples(st.sampled_from([*sorted(files), *["a record"] * 5]), EDITS), check


def _put_record(files: dict[str, bytes], record: bytes) -> None:
    """Put another record for the first task behind the others."""
    rows, start = np.frombuffer(files["tasks.bin"], TASK).copy(), len(files["records.bin"])
    rows[0]["start"], rows[0]["size"] = start, len(record)
    rows[0]["record_sha256"] = np.void(record_digest(record))
    rows[0]["crc32"] = zlib.crc32(rows[0].tobytes()[:-4])
    values = {**json.loads(files["task_store.json"]), "record_bytes": start + len(record)}
    del values["sha256"]
    values["sha256"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    files["tasks.bin"], files["records.bin"] = rows.tobytes(), files["records.bin"] + record
    files["task_store.json"] = json.dumps(values).encode()


# Names of tasks


def task_names(folder: Path) -> Prepared:
    """A task gets any name and any texts, and the model is written and read again."""
    model = lived_in("bert")
    before = model.tasks

    def set_tasks(tasks: Sequence[Task]) -> None:
        states = model.task_table.states()
        for state, task in zip(states, tasks, strict=True):
            state.task = task
        model.task_table.replace(states)

    def check(inputs: tuple[Any, Any, dict[str, Any]]) -> None:
        name, unknown, options = inputs
        with only_own_errors(folder):
            model.task_table.rename(unknown, "mood")
        with suppress(HyperAdaptersError):
            tasks = [*model.tasks[:2], Task.classification(name, **options)]
            model.task_table.rename("mood", name)
            set_tasks(tasks)
            model.save_pretrained(folder / "run")
            assert read_checkpoint(folder / "run")[0].tasks == tuple(tasks)
            set_tasks(before)
        written = {path.split("-")[0] for path in files_in(folder)}
        run = str(folder / "run")
        assert written <= {run, f"{run}/hyperadapter.json", f"{run}/README.md", f"{run}/adapters", f"{run}/tokenizer"}

    labels = st.one_of(st.just(["bad", "good"]), st.lists(TEXTS, min_size=2, max_size=2))
    options = st.fixed_dictionaries(
        {"labels": labels},
        optional={"template": TEXTS, "verbalizer": st.dictionaries(TEXTS, TEXTS, min_size=2, max_size=2)},
    )
    names = st.one_of(TEXTS, st.tuples(TEXTS, TEXTS).map("".join), VALUES)
    return st.tuples(names, st.one_of(TEXTS, VALUES), options), check


# Adapters of PEFT


def peft_values(folder: Path) -> Prepared:
    """Values of the JSON files and tensors of a LoRA are replaced."""
    model, where = make_model("gpt2", "lora", feature_layer=2), folder / "lora"
    export_peft(model, "mood", where)
    config, task = (
        json.loads((where / name).read_bytes()) for name in ("adapter_config.json", "hyperadapters_task.json")
    )
    state = load((where / "adapter_model.safetensors").read_bytes())

    def check(inputs: Any) -> None:
        changes, of_task, tensors = inputs
        _written(where / "adapter_config.json", json.dumps(changed(config, changes)).encode())
        _written(where / "hyperadapters_task.json", json.dumps(changed(task, of_task)).encode())
        _written(where / "adapter_model.safetensors", save(changed(state, tensors)))
        _check_import(folder, model, where)

    none = st.just([])
    backbone = {"backbone": task["backbone"]}
    tensors = st.one_of(none, _changes_of_tensors(state))
    return st.tuples(st.one_of(none, changes_of(config)), st.one_of(none, none, changes_of(backbone)), tensors), check


def peft_bytes(folder: Path) -> Prepared:
    """The bytes of one of the files of a LoRA are altered."""
    model, where = make_model("gpt2", "lora", feature_layer=2), folder / "lora"
    export_peft(model, "mood", where)
    files = {path: path.read_bytes() for path in sorted(where.iterdir())}
    weights = files[where / "adapter_model.safetensors"]
    header = 8 + int.from_bytes(weights[:8], "little")

    def check(inputs: Any) -> None:
        path, edits = inputs
        content = files[path]
        if content is weights:
            _written(path, edited(weights[:header], edits) + weights[header:])
        else:
            _written(path, edited(content, edits))
        _check_import(folder, model, where)
        _written(path, content)

    return st.tuples(st.sampled_from(sorted(files)), EDITS), check


def _check_import(folder: Path, model: Any, where: Path) -> None:
    with only_own_errors(folder):
        import_peft(model, "mood", where)
        assert all(tensor.isfinite().all() for tensor in model.method.own_adapters.parameters())


# Results for reports


def run_files(folder: Path) -> Prepared:
    values = run_values(rows=2)
    details = values["details.json"]
    details |= {"points": details["points"][:1], "prototypes": []}  # maps take long
    run = write_values(folder / "run", values)
    names = [name for name in values if name.endswith(".json")]

    def check(inputs: tuple[str, Any]) -> None:
        name, changes = inputs
        write_values(run, {name: changed(values[name], changes)})
        with only_own_errors(folder):
            _draw(run_report(read_run(run)))
        write_values(run, {name: values[name]})

    _draw(run_report(read_run(run)))
    return st.one_of(*(st.tuples(st.just(name), changes_of(values[name])) for name in names)), check


def result_row_files(folder: Path) -> Prepared:
    values, path = result_rows()[:2], folder / "rows.jsonl"

    def check(changes: Any) -> None:
        found = changed(values, changes)
        path.write_text("\n".join(map(json.dumps, found if isinstance(found, list) else [found])))
        with only_own_errors(folder):
            _draw(rows_report(path, *read_rows(path)))

    return changes_of(values), check


def _draw(report: Report) -> None:
    for chart in report.charts:
        json.dumps(plotly_figure(chart), allow_nan=False)


TARGETS = {
    "recipe_of_bytes": Target(recipe_of_bytes, 500),
    "recipe_of_edits": Target(recipe_of_edits, 1000),
    "recipe_of_values": Target(recipe_of_values, 500),
    "json_lines": Target(json_lines, 1000),
    "csv": Target(csv, 1000),
    "tsv": Target(tsv, 1000),
    "parquet": Target(parquet, 1000),
    "rows_of_json": Target(rows_of_json, 300),
    "schema": Target(schema, 500),
    "rows_of_arrow": Target(rows_of_arrow, 500),
    "rows_in_memory": Target(rows_in_memory, 500),
    "checkpoint_of_bytes": Target(checkpoint_of_bytes, 800),
    "checkpoint_weights": Target(checkpoint_weights, 800),
    "checkpoint_values": Target(checkpoint_values, 400),
    "task_store": Target(task_store, 500),
    "task_names": Target(task_names, 2000),
    "peft_values": Target(peft_values, 1000),
    "peft_bytes": Target(peft_bytes, 1000),
    "run_files": Target(run_files, 200),
    "result_row_files": Target(result_row_files, 400),
}
