"""The runtime without torch (promise 13): the model's answers, its imports, and folders that are damaged or hostile."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas
import pytest
import torch
from helpers import (
    FORM_SETTINGS,
    HEAD_TASKS,
    PAIR_TASKS,
    SIZES,
    add_new,
    empty_centroids,
    make_frozen_texts_model,
    make_method_model,
    make_model,
    make_plus_model,
    pair_examples,
    rows_of,
    state_of,
    stirred,
    tiny_backbone,
    tokenizer_of,
)

from hyperadapters.config import ModelConfig, Task, parse
from hyperadapters.core import AdapterWeights, OwnAdapter
from hyperadapters.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    ExportError,
    HyperAdaptersError,
    NotFiniteError,
    OutputError,
    TaskError,
)
from hyperadapters.inference.predictor import Prediction, Predictor
from hyperadapters.inference.routing import calibrate
from hyperadapters.interop.runtime import export_runtime
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.runtime import Prediction as Answer
from hyperadapters.runtime import Runtime
from hyperadapters.runtime.folder import FILES, SETTINGS_FILE

SINGLE_TEXTS = ("w1 w2 w3", "w4 red w5 w6 w7 w8", "w9 blue", "w11", "good", "w7 </s> w8", "w3 " * 200, "unheard of")
WORDLESS = ("", "  ", "</s>")
PAIRS = (("w1 w2", "w1 w2"), ("w4", "w5 w6 w7 w8 w9"), ("w9 blue", ""), ("", "w2"), ("w2 " * 90, "w3 " * 90))


def small_model(kind: str, tasks: list[Task], style: str = "plain", **settings: Any) -> HyperAdapterModel:
    """A model on two random layers whose every part has an effect."""
    torch.manual_seed(0)
    config = parse(ModelConfig, {"feature_layer": 1, **SIZES, **settings})
    model = HyperAdapterModel(tiny_backbone(kind, num_hidden_layers=2), tasks, config)
    model.tokenizer = tokenizer_of(style)
    assert model.heads is not None
    model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
    model.heads.temperature.copy_(torch.tensor([1.7, 1.0, 0.6]))
    return stirred(model).eval()


def plus_model() -> HyperAdapterModel:
    """Densities, texts of pairs apart, an added task, and thresholds that decline about half of the inputs."""
    model = small_model("bert", PAIR_TASKS)
    rows = pair_examples()
    calibrate(model, rows, rows, false_decline_rate=0.5)
    add_new(model)
    topics = Task.multi_label("topics", ["a", "b", "c"])
    model.add_task(topics, rows_of(topics, 1))
    assert model.heads is not None
    model.heads.thresholds[model.heads.outputs_of(4)] = torch.tensor([0.2, 0.5, 0.6])
    return model


def paper_model() -> HyperAdapterModel:
    """Prototypes and centroids, token types, an adapter of its own, and an added task whose head reads features."""
    model = small_model("bert", PAIR_TASKS, "bert", preset="paper")
    with torch.no_grad():
        empty_centroids(model, 2)[1:].normal_()
        model.pha.thresholds.copy_(torch.tensor([0.3, 0.4, -torch.inf]))
        weights = model.method.adapters(torch.tensor([2]))
        changed = AdapterWeights({name: 1.5 * tensor + 0.01 for name, tensor in weights.items()})
        model.pha.own_adapters["2"] = OwnAdapter(changed)
    add_new(model)
    return model


def lora_model() -> HyperAdapterModel:
    """LoRAs and an input of the retriever that a whole pass computes, on an architecture with other layers."""
    settings = {name: value for name, value in SIZES.items() if name != "adapter_dim"} | FORM_SETTINGS["lora"]
    torch.manual_seed(0)
    config = parse(ModelConfig, {"preset": "paper", "feature_layer": 1, "features": "backbone", **settings})
    model = HyperAdapterModel(tiny_backbone("modernbert", num_hidden_layers=2), HEAD_TASKS, config)
    model.tokenizer = tokenizer_of("roberta")
    return stirred(model).eval()


MODELS: dict[str, Callable[[], HyperAdapterModel]] = {"plus": plus_model, "paper": paper_model, "lora": lora_model}


class Exported:
    """A model, the folder of its runtime, and the model's state before and after."""

    def __init__(self, model: HyperAdapterModel, folder: Path) -> None:
        self.model, self.folder, self.before = model, folder, state_of(model)
        export_runtime(model, folder)
        self.after = state_of(model)
        self.runtime = Runtime(folder)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """Each model is exported once, when it is asked for first, because an export takes seconds."""
    made: dict[str, Exported] = {}

    def export(name: str) -> Exported:
        if name not in made:
            made[name] = Exported(MODELS[name](), tmp_path_factory.mktemp(name) / "runtime")
        return made[name]

    return export


@pytest.fixture
def plus(exports: Callable[[str], Exported]) -> Exported:
    return exports("plus")


@pytest.fixture
def copied(plus: Exported, tmp_path: Path) -> Path:
    """A folder to damage."""
    return Path(shutil.copytree(plus.folder, tmp_path / "copy"))


def inputs_of(model: HyperAdapterModel) -> list[dict[str, Any]]:
    """Texts and pairs for every task, and without a task, in one list."""
    found: list[dict[str, Any]] = [{"text": text} for text in (*SINGLE_TEXTS, *WORDLESS)]
    found += [{"text": first, "text_pair": second} for first, second in PAIRS]
    for task in model.tasks:
        rows = [dict(zip(task.fields, row, strict=False)) for row in (PAIRS if task.is_pair else zip(SINGLE_TEXTS))]
        found += [{**row, "task": task.name} for row in rows]
    return found[::2] + found[1::2]


def assert_same(found: list[Answer], expected: list[Prediction]) -> None:
    assert [answer.task for answer in found] == [prediction.task for prediction in expected]
    for answer, prediction in zip(found, expected, strict=True):
        if prediction.routing is None:
            assert (answer.nearest, answer.similarity, answer.margin, answer.accepted) == (None, None, None, None)
        else:
            numbers = prediction.routing.similarity, prediction.routing.margin
            assert answer.nearest == prediction.routing.candidates[0].task
            assert (answer.similarity, answer.margin) == pytest.approx(numbers, abs=1e-4, rel=1e-4)
            assert answer.accepted == prediction.routing.accepted
        assert answer.probabilities == (
            pytest.approx(prediction.probabilities, abs=1e-4) if prediction.probabilities else None
        )
        if isinstance(prediction.answer, float):
            assert answer.answer == pytest.approx(prediction.answer, abs=1e-4, rel=1e-4)
        else:
            assert answer.answer == prediction.answer


# The answers


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("name", ["plus", *(pytest.param(name, marks=pytest.mark.slow) for name in ("paper", "lora"))])
def test_mixed_batches_get_the_answers_of_the_model(
    name: str, batch_size: int, exports: Callable[[str], Exported]
) -> None:
    exported = exports(name)
    inputs = inputs_of(exported.model)
    found = exported.runtime.predict(inputs, batch_size=batch_size)
    assert_same(found, list(Predictor(exported.model)(inputs)))
    assert {answer.task for answer in found} == {*exported.runtime.tasks, None}
    assert exported.runtime.tasks == tuple(task.name for task in exported.model.tasks)


def test_what_is_declined_can_be_answered(plus: Exported) -> None:
    inputs = [entry for entry in inputs_of(plus.model) if "task" not in entry]
    found = plus.runtime.predict(inputs, decline=False)
    assert_same(found, list(Predictor(plus.model, decline=False)(inputs)))
    assert {answer.accepted for answer in found if answer.task is not None} == {True, False}
    assert [answer.task for answer in plus.runtime.predict(WORDLESS, decline=False)] == [None] * len(WORDLESS)


def test_the_task_of_all_inputs_can_be_named(plus: Exported) -> None:
    assert_same(plus.runtime.predict(PAIRS, task="same"), list(Predictor(plus.model)(PAIRS, task="same")))
    table = pandas.DataFrame({"text": SINGLE_TEXTS})
    assert_same(plus.runtime.predict(table, task="mood"), list(Predictor(plus.model)(SINGLE_TEXTS, task="mood")))
    assert plus.runtime.predict(iter(())) == []


@pytest.mark.slow
def test_methods_that_cannot_route_answer_for_given_tasks(tmp_path: Path) -> None:
    model = make_method_model("roberta", "hyperformer")
    model.tokenizer = tokenizer_of("roberta")
    export_runtime(model, tmp_path / "out")
    runtime = Runtime(tmp_path / "out", threads=1)
    assert_same(runtime.predict(SINGLE_TEXTS, task="mood"), list(Predictor(model)(SINGLE_TEXTS, task="mood")))
    with pytest.raises(TaskError, match="cannot route: give each input its task"):
        runtime.predict(SINGLE_TEXTS)


@pytest.mark.slow
def test_graphs_do_not_depend_on_the_tasks(plus: Exported, tmp_path: Path) -> None:
    model = MODELS["plus"]()
    model.remove_task("mood")
    export_runtime(model, tmp_path / "out")
    for name in ("lower.onnx", "upper.onnx"):
        assert (tmp_path / "out" / name).read_bytes() == (plus.folder / name).read_bytes()


@pytest.mark.slow
def test_int8_computes_with_integers_and_keeps_adapters(plus: Exported, tmp_path: Path) -> None:
    export_runtime(plus.model, tmp_path / "out", quantize="int8")
    operations = [node.op_type for node in onnx.load(tmp_path / "out" / "upper.onnx").graph.node]
    assert "MatMulInteger" in operations
    assert "MatMul" in operations  # of adapters, whose weights are inputs
    assert json.loads((tmp_path / "out" / SETTINGS_FILE).read_text())["quantization"] == "int8"
    inputs = [entry for entry in inputs_of(plus.model) if entry.get("task") in ("same", "mood", "new")]
    exact, found = plus.runtime.predict(inputs), Runtime(tmp_path / "out").predict(inputs)
    apart = [
        abs(value - (a.probabilities or {})[label])
        for a, b in zip(exact, found, strict=True)
        for label, value in (b.probabilities or {}).items()
    ]
    assert 1e-4 < max(apart) < 0.5


def test_the_model_stays_as_it_is_and_the_folder_is_whole(plus: Exported) -> None:
    torch.testing.assert_close(plus.before.pop("values"), plus.after.pop("values"), atol=0, rtol=0)
    assert plus.before == plus.after
    assert {path.name for path in plus.folder.iterdir()} == {SETTINGS_FILE, *FILES}
    assert list(plus.folder.parent.iterdir()) == [plus.folder]


# Without torch

ANSWER = """
import sys
from hyperadapters.runtime import Runtime
print(*(answer.answer for answer in Runtime(sys.argv[1]).predict(["w1 w2", "good"], task="mood")))
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def test_only_three_packages_are_imported(plus: Exported) -> None:
    done = subprocess.run([sys.executable, "-c", ANSWER, plus.folder], capture_output=True, text=True, check=True)
    answers, modules = done.stdout.splitlines()
    expected = [prediction.answer for prediction in Predictor(plus.model)(["w1 w2", "good"], task="mood")]
    assert answers.split() == expected
    expected_modules = {"hyperadapters", "numpy", "onnxruntime", "tokenizers"}
    assert {*modules.split()} - {"__main__", "_distutils_hack"} == expected_modules


# What cannot be exported


def _without_padding() -> HyperAdapterModel:
    model = make_plus_model()
    model.tokenizer.pad_token = None
    return model


def _with_too_many_tokens() -> HyperAdapterModel:
    model = make_plus_model()
    model.tokenizer.add_tokens(["w99"])
    return model


def _merged() -> HyperAdapterModel:
    model = make_model("bert", "lora")
    model.merge("mood")
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: make_model("t5"), ExportError, "for encoder backbones, which have task heads"),
        (lambda: make_plus_model().bfloat16(), ExportError, r"float32, found .* in bfloat16; call model.float\(\)"),
        (make_frozen_texts_model, ExportError, "head_inputs 'pair_features'.*train with head_inputs 'adapted_texts'"),
        (lambda: make_method_model("bert", "hyperdecoder"), TaskError, "generates adapters for inputs, not for tasks"),
        (_merged, TaskError, r"merged into the backbone.*call unmerge\(\)"),
        (_without_padding, ExportError, "a padding token, found none"),
        (_with_too_many_tokens, BackboneError, "token ids up to 51, but .* below 51"),
    ],
)
def test_what_the_runtime_cannot_represent_is_refused(
    make: Callable[[], HyperAdapterModel], error: type[HyperAdaptersError], message: str, tmp_path: Path
) -> None:
    model = make()
    if not model.has_tokenizer:
        model.tokenizer = tokenizer_of("plain")
    with pytest.raises(error, match=message):
        export_runtime(model, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_unknown_quantisations_and_full_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Unknown quantization 'int4'"):
        export_runtime(make_plus_model(), tmp_path / "out", quantize="int4")  # type: ignore[arg-type]
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(OutputError, match="already exists"):
        export_runtime(make_plus_model(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


# Inputs


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("w1", {}, DataError, "expected a list or another iterable of inputs, found str"),
        ([1], {}, DataError, "input 1: expected a string, a pair of strings or a mapping with 'text', found 1"),
        (["w1", {"text": None}], {}, DataError, "input 2: expected a string in 'text', found None"),
        (["\ud800"], {}, DataError, "input 1: expected Unicode text in 'text'"),
        ([("w1", "w2")], {"task": "mood"}, DataError, "a text_pair, which task 'mood' does not read"),
        (["w1"], {"task": "same"}, DataError, "expected a string in 'text_pair', found None"),
        (["w1"], {"task": "mod"}, TaskError, "Unknown task 'mod'. Did you mean 'mood'?"),
        ([{"text": "w1", "task": "x"}], {}, TaskError, "input 1: Unknown task 'x'"),
        (["w1"], {"batch_size": 0}, DataError, "batch_size: expected an integer of 1 or more, found 0"),
        (["w1"], {"decline": "no"}, DataError, "decline: expected True or False, found 'no'"),
    ],
)
def test_inputs_of_another_form_are_refused(
    texts: Any, options: dict[str, Any], error: type[HyperAdaptersError], message: str, plus: Exported
) -> None:
    with pytest.raises(error, match=message.replace("?", r"\?")):
        plus.runtime.predict(texts, **options)


def test_the_number_of_threads_is_checked(plus: Exported) -> None:
    with pytest.raises(DataError, match="threads: expected an integer of 1 or more, found 0"):
        Runtime(plus.folder, threads=0)


# Folders from outside


def settings_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text())
    return found


def sign(folder: Path, **changed: Any) -> None:
    """Write settings whose sizes and checksums are those of the files, as a hostile folder has them."""
    values = {**settings_of(folder), **changed}
    for name in FILES:
        data = (folder / name).read_bytes()
        values["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / SETTINGS_FILE).write_text(json.dumps(values))


def safetensors(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_a_folder_without_settings_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="found none; write one with: hyperadapters export RUN --format runtime"):
        Runtime(tmp_path / "nowhere")


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(name: str, copied: Path) -> None:
    data = (copied / name).read_bytes()
    for damaged in (data[:-1], data + b"x", data[:-1] + bytes([data[-1] ^ 1]), b""):
        (copied / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name}: expected .* bytes.*export the model again"):
            Runtime(copied)
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}: expected a file, found none"):
        Runtime(copied)


@pytest.mark.parametrize("name", [SETTINGS_FILE, *FILES])
def test_links_that_lead_out_of_the_folder_are_not_followed(name: str, copied: Path, tmp_path: Path) -> None:
    (copied / name).rename(tmp_path / "secret")
    (copied / name).symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError):
        Runtime(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[" * 5000, "expected JSON"),
        ("[]", "expected an object"),
        ('{"format": 2}', "expected format 1, found 2"),
        ('{"format": 1}', "'tasks': expected list, found None"),
        (" " * (16 * 2**20 + 1), "expected at most 16777216 bytes"),
    ],
)
def test_settings_that_are_no_settings_are_refused(text: str, message: str, copied: Path) -> None:
    (copied / SETTINGS_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Runtime(copied)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"tasks": []}, "expected at least one task"),
        ({"tasks": [1]}, "tasks: expected objects, found 1"),
        ({"routing": "chance"}, "routing: expected one of densities, prototypes or null"),
        ({"routing": "prototypes"}, "expected the arrays .*, found"),
        ({"separates_texts": 1}, "'separates_texts': expected bool, found 1"),
        ({"separates_texts": False}, "'heads.0.weight': expected shape"),
        ({"padding_id": True}, "'padding_id': expected int, found True"),
        ({"padding_id": -1}, "padding_id: expected a token id, found -1"),
        ({"padding_id": 10**30}, "padding_id: expected a token id, found 1000"),
        ({"special_ids": ["a"]}, "'special_ids': expected a list of int"),
    ],
)
def test_settings_of_another_model_are_refused(changed: dict[str, Any], message: str, copied: Path) -> None:
    sign(copied, **changed)
    with pytest.raises(CheckpointError, match=message):
        Runtime(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "text-to-text"}, "expected a kind with labels or a regression"),
        ({"labels": []}, "expected a kind with labels or a regression"),
        ({"labels": ["no", "yes", "both"]}, r"'heads.0.weight': expected shape \[3, 33\], found \[2, 33\]"),
        ({"kind": "multi-label"}, "'thresholds': expected list, found None"),
        ({"kind": "multi-label", "thresholds": [0.5]}, "expected a threshold for each label"),
        ({"name": "mood"}, "each with a name of its own"),
        ({"is_pair": None}, "'is_pair': expected bool, found None"),
        ({"target_std": "1"}, "'target_std': expected float, found '1'"),
    ],
)
def test_tasks_that_are_no_tasks_are_refused(change: dict[str, Any], message: str, copied: Path) -> None:
    first, *others = settings_of(copied)["tasks"]
    sign(copied, tasks=[{**first, **change}, *others])
    with pytest.raises(CheckpointError, match=message):
        Runtime(copied)


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "expected a header"),
        (b"\xff" * 8, "expected a header of at most"),
        ((2**20).to_bytes(8, "little"), "expected a header"),
        (b"\x01" + 7 * b"\0" + b"{", "expected a header in JSON"),
        (safetensors([]), "expected an object as header"),
        (safetensors({"a": 1}), "'a': expected an array in float32, found 1"),
        (safetensors({"a": {**ENTRY, "dtype": "O"}}, bytes(4)), "'a': expected an array in float32"),
        (safetensors({"a": {**ENTRY, "shape": [-1]}}, bytes(4)), "'a': expected a shape and offsets"),
        (safetensors({"a": {**ENTRY, "shape": [10**9, 10**9]}}, bytes(4)), "'a': expected 4000000000000000000 bytes"),
        (safetensors({"a": {**ENTRY, "data_offsets": [0, 8]}}, bytes(4)), "'a': expected a shape and offsets"),
        (safetensors({"a": {**ENTRY, "data_offsets": [4, 0]}}, bytes(4)), "'a': expected a shape and offsets"),
        (safetensors({"a": ENTRY}, bytes(4)), "expected the arrays .*, found"),
    ],
)
def test_arrays_that_are_no_arrays_are_refused(data: bytes, message: str, copied: Path) -> None:
    (copied / "tasks.safetensors").write_bytes(data)
    sign(copied)
    with pytest.raises(CheckpointError, match=message):
        Runtime(copied)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lower.onnx", "onnxruntime cannot load the graph"),
        ("upper.onnx", "onnxruntime cannot load the graph"),
        ("tokenizer.json", "tokenizers cannot load the tokenizer"),
    ],
)
def test_files_that_the_packages_cannot_load_are_refused(name: str, message: str, copied: Path) -> None:
    (copied / name).write_bytes(b"\xff\x00 not a graph")
    sign(copied)
    with pytest.raises(CheckpointError, match=message):
        Runtime(copied)


def test_a_tokenizer_without_its_unknown_token_is_refused(copied: Path) -> None:
    values = json.loads((copied / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "[none of these]"
    (copied / "tokenizer.json").write_text(json.dumps(values))
    sign(copied)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizer cannot tokenise an input"):
        Runtime(copied).predict(["a text of words that are unknown"])


def test_a_size_that_no_memory_has_is_refused(copied: Path) -> None:
    files = settings_of(copied)["files"]
    files["lower.onnx"]["bytes"] = 2**62
    (copied / SETTINGS_FILE).write_text(json.dumps({**settings_of(copied), "files": files}))
    with pytest.raises(CheckpointError, match=r"lower\.onnx"):
        Runtime(copied)


def changed_output(path: Path, name: str, change: Any) -> None:
    """Let an output of a graph be what a node makes of it."""
    graph = onnx.load(path)
    [node] = [node for node in graph.graph.node if name in node.output]
    node.output[[*node.output].index(name)] = "before"
    change(graph.graph)
    path.write_bytes(graph.SerializeToString())


def test_outputs_of_other_types_and_numbers_of_rows_are_refused(copied: Path) -> None:
    def first_row(graph: Any) -> None:
        start, stop = (onnx.numpy_helper.from_array(np.array([n]), f"at_{n}") for n in (0, 1))
        graph.initializer.extend([start, stop])
        graph.node.append(onnx.helper.make_node("Slice", ["before", "at_0", "at_1", "at_0"], ["pooled"]))

    def as_integers(graph: Any) -> None:
        graph.node.append(onnx.helper.make_node("Cast", ["before"], ["pooled"], to=onnx.TensorProto.INT64))
        [output] = [value for value in graph.output if value.name == "pooled"]
        output.type.tensor_type.elem_type = onnx.TensorProto.INT64

    original = (copied / "upper.onnx").read_bytes()
    changed_output(copied / "upper.onnx", "pooled", first_row)
    sign(copied)
    with pytest.raises(CheckpointError, match=r"upper\.onnx: expected outputs with a row for each text"):
        Runtime(copied).predict(["w1", "w2 w3"], task="mood")
    (copied / "upper.onnx").write_bytes(original)
    changed_output(copied / "upper.onnx", "pooled", as_integers)
    sign(copied)
    with pytest.raises(CheckpointError, match=r"upper\.onnx: expected outputs in float32"):
        Runtime(copied)


def test_exchanged_graphs_are_refused(copied: Path) -> None:
    (copied / "lower.onnx").write_bytes((copied / "upper.onnx").read_bytes())
    sign(copied)
    with pytest.raises(CheckpointError, match=r"lower\.onnx: expected the inputs attention_mask, input_ids, found"):
        Runtime(copied)


def test_a_graph_reads_no_other_file(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of a graph may be in another file, whose path is in the graph."""
    graph = onnx.load(copied / "upper.onnx")
    monkeypatch.chdir(tmp_path)
    weight = max(graph.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    (tmp_path / "secret").write_bytes(weight.raw_data)  # so that the graph could be run
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    (copied / "upper.onnx").write_bytes(graph.SerializeToString())
    sign(copied)
    with pytest.raises(CheckpointError, match=r"upper\.onnx: expected a graph with its weights"):
        Runtime(copied)


def test_a_graph_that_cannot_be_run_is_named(copied: Path) -> None:
    sign(copied, padding_id=10**6)
    with pytest.raises(CheckpointError, match=r"lower\.onnx: onnxruntime cannot run the graph"):
        Runtime(copied).predict(["w1 w2 w3", "w1"])


def test_values_that_are_not_finite_name_the_input(copied: Path) -> None:
    path = copied / "tasks.safetensors"
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    first, last = header["heads.2.bias"]["data_offsets"]
    data[start + first : start + last] = np.full((last - first) // 4, np.nan, dtype="<f4").tobytes()
    path.write_bytes(data)
    sign(copied)
    runtime = Runtime(copied)
    assert runtime.predict([("w1", "w2")], task="same")
    with pytest.raises(NotFiniteError, match=r"input 2 \('w2'\): what the model computes is not a finite number"):
        runtime.predict([{"text": "w1", "text_pair": "w2", "task": "same"}, {"text": "w2", "task": "mood"}])
