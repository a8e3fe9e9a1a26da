"""Promise 5: a checkpoint gives the same outputs back, holds nothing of the backbone, and damage is noticed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    ENCODER_DECODERS,
    ENCODERS,
    RECORDED,
    VOCABULARY,
    empty_centroids,
    make_batch,
    make_model,
    save_backbone,
    tiny_backbone,
    tiny_tokenizer,
)
from safetensors import safe_open
from safetensors.torch import load_file, save
from tolerance import rounding
from torch import Tensor
from transformers import AutoModel, BertModel

from hyperadapters.backbones.loading import fingerprint
from hyperadapters.checkpoints.conversion import RENAMED_TENSORS, convert_settings, convert_task
from hyperadapters.checkpoints.format import CONFIG_FILE, load_state, read_checkpoint, stored_digest
from hyperadapters.config import ModelConfig, Task
from hyperadapters.core import AdapterWeights
from hyperadapters.data.examples import Example
from hyperadapters.errors import BackboneError, CheckpointError, OutputError
from hyperadapters.heads.task_heads import Head
from hyperadapters.inference.predictor import Predictor
from hyperadapters.inference.routing import decide
from hyperadapters.model.model import HyperAdapterModel


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _weights_file(folder: Path) -> Path:
    (path,) = folder.glob("adapters-*.safetensors")
    return path


@pytest.mark.parametrize("kind", [*ENCODERS, *ENCODER_DECODERS])
def test_saving_and_loading_gives_the_same_outputs_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model, batch = make_model(kind), make_batch(kind)
    if model.heads is not None:
        model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
    model.save_pretrained(tmp_path / "run")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run", backbone=tiny_backbone(kind))
    assert loaded.tasks == model.tasks
    assert loaded.adapter_config == model.adapter_config
    before, after = model(**batch), loaded(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)


def test_the_backbone_is_found_by_its_name(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "backbone", "t5")
    model = HyperAdapterModel.from_backbone(
        str(folder), [Task.text_to_text("a"), Task.text_to_text("b")], adapter_dim=4
    )
    model.eval().save_pretrained(tmp_path / "run")
    batch = make_batch("t5")
    batch["task_ids"] = batch["task_ids"].clamp(max=1)
    assert torch.equal(HyperAdapterModel.from_pretrained(tmp_path / "run")(**batch).logits, model(**batch).logits)


def test_the_official_preset_survives(tmp_path: Path) -> None:
    model, batch = make_model("t5", preset="official"), make_batch("t5")
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("t5"))
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)


def test_a_checkpoint_is_two_files_and_a_card_without_backbone_weights_or_pickle(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    with safe_open(_weights_file(tmp_path), framework="pt") as file:
        names = set(file.keys())
    # The first is empty, and the others have their defaults.
    left_out = {"method.prototypes.centroids", "method.adapter_scales"} | {
        f"heads.{name}" for name in ("temperature", "error_bounds", "thresholds")
    }
    assert names == {name for name in model.state_dict() if not name.startswith("backbone.")} - left_out
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["backbone"]["fingerprint"] == model.fingerprint.bfloat16
    assert config["format_version"] == 10


def test_saving_again_replaces_the_old_weights(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    first = _weights_file(tmp_path).name
    with torch.no_grad():
        model.method.prototypes.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    assert _weights_file(tmp_path).name != first
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert torch.equal(loaded.method.prototypes.weight, model.method.prototypes.weight)


@pytest.mark.parametrize("step", range(6))
def test_a_save_that_dies_anywhere_leaves_the_old_or_the_new_state(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The steps: fsync, replace and fsync of the folder for the weights, then the same for the JSON file."""
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    old = model.method.prototypes.weight.detach().clone()
    new = old + 1.0
    with torch.no_grad():
        model.method.prototypes.weight.add_(1.0)
    calls = 0

    def dying(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise OSError("killed")
            return real(*arguments)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying(os.fsync))
        patch.setattr(os, "replace", dying(os.replace))
        with pytest.raises(OutputError, match="cannot be written: killed"):
            model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
    assert torch.equal(loaded.method.prototypes.weight, old if step < 5 else new)
    assert not list(tmp_path.glob(".*.tmp"))


def test_several_that_save_to_one_folder_leave_one_of_their_states_and_readers_find_one_throughout(
    tmp_path: Path,
) -> None:
    models = [make_model("bert") for _ in range(3)]
    for number, model in enumerate(models):
        model.method.prototypes.weight.data.fill_(float(number))
    models[0].save_pretrained(tmp_path)

    def save(model: HyperAdapterModel) -> None:
        for _ in range(20):
            model.save_pretrained(tmp_path)

    def read(_: int) -> set[float]:
        return {read_checkpoint(tmp_path)[1]["method.prototypes.weight"].mean().item() for _ in range(60)}

    with ThreadPoolExecutor(5) as pool:
        saved, found = pool.map(save, models), pool.map(read, range(2))
        assert list(saved) == [None] * 3
        assert set().union(*found) <= {0.0, 1.0, 2.0}
    _weights_file(tmp_path)
    assert _load(tmp_path).method.prototypes.weight.mean().item() in {0.0, 1.0, 2.0}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_save_that_fails_is_not_the_folder_of_the_model(tmp_path: Path) -> None:
    model = make_model("bert")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="the folder cannot be created"):
        model.save_pretrained(tmp_path / "file" / "run")
    assert model.folder is None
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / CONFIG_FILE).mkdir()
    with pytest.raises(OutputError, match=f"{CONFIG_FILE}: cannot be written"):
        model.save_pretrained(tmp_path / "made")
    assert model.folder is None
    model.save_pretrained(tmp_path / "run")
    assert model.folder == tmp_path / "run"


# The backbone and its tokenizer


def _from_folder(folder: Path, kind: str = "bert", name: str | None = None) -> HyperAdapterModel:
    """A model on a backbone that is written to a folder first."""
    save_backbone(folder, kind)
    tasks = [Task.classification("mood", ["bad", "good"]), Task.classification("colour", ["red", "blue"])]
    return HyperAdapterModel.from_backbone(name or str(folder), tasks, preset="paper").eval()


def _answers(model: HyperAdapterModel, text: str = "good neu") -> list[Any]:
    return [(found.text, found.probabilities) for found in Predictor(model)([text], task="mood")]


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_a_token_without_an_embedding_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model = _from_folder(tmp_path / kind, kind)
    model.tokenizer.add_tokens(["unused", "neu"])
    list(Predictor(model)(["good w1"], task="mood"))  # only what occurs has to be there
    size = len(VOCABULARY)
    message = rf"the token 'neu' of the tokenizer has id {size + 1}, .* ids below {size}; .*resize_token_embeddings"
    with pytest.raises(BackboneError, match=message):
        list(Predictor(model)(["good neu"], task="mood"))
    rows = [{"text": "neu", "label": "bad"}, {"text": "w1", "label": "good"}] * 4
    with pytest.raises(BackboneError, match=message):
        model.add_task(Task.classification("new", ["bad", "good"]), rows)
    with pytest.raises(BackboneError, match=message):
        model.collator([Example(0, "good", None, 0), Example(0, "neu", None, 1)])
    assert len(model.tasks) == 2


def test_a_label_without_an_embedding_is_refused_by_name(tmp_path: Path) -> None:
    model = _from_folder(tmp_path / "t5", "t5")
    model.tokenizer.add_tokens(["neu"])
    labels = HyperAdapterModel(tiny_backbone("t5"), [Task.classification("new", ["neu", "good"])], ModelConfig())
    labels.tokenizer = model.tokenizer
    with pytest.raises(BackboneError, match="the token 'neu' of the tokenizer"):
        labels.collator([Example(0, "good", None, 0)])


def test_a_backbone_with_more_embeddings_than_tokens_is_as_before(tmp_path: Path) -> None:
    backbone: Any = tiny_backbone("bert", vocab_size=128)
    model = HyperAdapterModel(backbone, [Task.classification("mood", ["bad", "good"])])
    model.tokenizer = tiny_tokenizer()
    model.tokenizer.add_tokens(["neu"])
    assert _answers(model.eval())


@pytest.mark.parametrize("kind", ["bert", "t5", "gpt2"])
def test_a_tokenizer_that_was_changed_is_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    save_backbone(tmp_path / kind, kind, vocab_size=64)
    tasks = [Task.classification("mood", ["bad", "good"])]
    model = HyperAdapterModel.from_backbone(str(tmp_path / kind), tasks, preset="paper").eval()
    model.tokenizer.add_tokens(["neu"])
    expected = _answers(model)
    model.save_pretrained(tmp_path / "run")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "run")
    assert loaded.tokenizer("neu")["input_ids"] == model.tokenizer("neu")["input_ids"]
    assert _answers(loaded) == expected
    assert json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["format_version"] == 10
    before = contents(tmp_path / "run")
    loaded.save_pretrained(tmp_path / "run")
    assert contents(tmp_path / "run") == before
    del loaded.tokenizer
    loaded.save_pretrained(tmp_path / "run")
    assert not list((tmp_path / "run").glob("tokenizer*"))
    assert json.loads((tmp_path / "run" / CONFIG_FILE).read_text())["format_version"] == 10


def test_a_tokenizer_that_was_used_but_not_changed_is_not_saved(tmp_path: Path) -> None:
    model = _from_folder(tmp_path / "bert")
    model.save_pretrained(tmp_path / "before")
    _answers(model)
    model.save_pretrained(tmp_path / "after")
    model.tokenizer = tiny_tokenizer()
    _answers(model)
    model.save_pretrained(tmp_path / "set")
    for name in ("after", "set"):
        (tmp_path / name / "README.md").unlink()
        found = contents(tmp_path / name)
        assert found == {file: data for file, data in contents(tmp_path / "before").items() if file in found}
        assert len(found) == 2


def test_the_tokenizer_of_a_backbone_given_in_memory_is_saved(tmp_path: Path) -> None:
    model = make_model("bert").eval()
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    assert _answers(_load(tmp_path)) == _answers(model)
    model.tokenizer = str.split
    before = contents(tmp_path)
    with pytest.raises(BackboneError, match="expected a tokenizer of transformers to save, found method_descriptor"):
        model.save_pretrained(tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("damage", ["altered", "gone", "more", "points outside"])
def test_damage_of_the_tokenizer_is_noticed(damage: str, tmp_path: Path) -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path)
    (folder,) = tmp_path.glob("tokenizer-*")
    message = "expected the tokenizer with sha256 .* a file is missing or altered: copy the folder again"
    if damage == "altered":
        file = folder / "tokenizer.json"
        file.write_text(file.read_text().replace('"good": ', '"gold": '))
    elif damage == "gone":
        shutil.rmtree(folder)
    elif damage == "more":
        (folder / "added_tokens.json").write_text("{}")
    else:
        values, message = json.loads((tmp_path / CONFIG_FILE).read_text()), "names no tokenizer in this folder"
        values["tokenizer"]["folder"] = "../" + values["tokenizer"]["folder"]
        (tmp_path / CONFIG_FILE).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message):
        _load(tmp_path)
    model.save_pretrained(tmp_path)
    assert _load(tmp_path).tokenizer("good")["input_ids"] == tiny_tokenizer()("good")["input_ids"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_vocabulary_can_grow_before_and_after_the_model_is_made(
    when: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    backbone: Any = AutoModel.from_pretrained(save_backbone(tmp_path / "bert"), add_pooling_layer=False)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["neu"])
    if when == "before":
        backbone.resize_token_embeddings(len(tokenizer))
    tasks = [Task.classification("mood", ["bad", "good"])]
    model = HyperAdapterModel(backbone, tasks, ModelConfig(preset="paper")).eval()
    model.tokenizer = tokenizer
    if when == "after":
        backbone.resize_token_embeddings(len(tokenizer))
    expected = _answers(model)
    with caplog.at_level(logging.WARNING, "hyperadapters"):
        model.save_pretrained(tmp_path / "run")
    assert ("weights of the backbone have changed since the model was made" in caplog.text) == (when == "after")
    with pytest.raises(CheckpointError, match=r"was trained on backbone .*bert' .* or pass them as backbone="):
        HyperAdapterModel.from_pretrained(tmp_path / "run")
    assert _answers(HyperAdapterModel.from_pretrained(tmp_path / "run", backbone=model.detach())) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_type_and_a_merged_task_do_not_change_the_backbone(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [Task.classification("mood", ["bad", "good"])]
    model = HyperAdapterModel(tiny_backbone("t5"), tasks, ModelConfig(form="lora", lora_rank=2)).eval()
    with torch.no_grad():
        for parameter in model.method.hypernetwork.parameters():
            parameter.add_(0.1)
    expected = model.fingerprint.bfloat16
    model.merge("mood")
    assert fingerprint(model.backbone) != expected
    model.save_pretrained(tmp_path)
    model.unmerge()
    model.to(dtype).save_pretrained(tmp_path)
    assert not caplog.records
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["backbone"]["fingerprint"] == expected


@pytest.mark.filterwarnings("ignore")  # of torchao
def test_a_model_that_was_quantised_afterwards_is_saved_for_the_plain_backbone(tmp_path: Path) -> None:
    quantisation: Any = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make_model("t5").eval()
    quantisation.quantize_(model.backbone, quantisation.Int8WeightOnlyConfig(version=2))
    model.save_pretrained(tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("t5"))
    assert torch.equal(loaded.method.prototypes.weight, model.method.prototypes.weight)


def test_a_relative_folder_of_a_backbone_is_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = _from_folder(Path("backbones/bert"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = _answers(model)
    model.save_pretrained("run")
    assert json.loads(Path("run", CONFIG_FILE).read_text())["backbone"]["name"] == str(tmp_path / "backbones/bert")
    monkeypatch.chdir("/")
    assert _answers(HyperAdapterModel.from_pretrained(tmp_path / "elsewhere/run")) == expected


@pytest.mark.parametrize("place", ["backbone", ".", "in/side"])
def test_a_checkpoint_and_the_backbone_inside_it_can_be_moved(place: str, tmp_path: Path) -> None:
    model = _from_folder(tmp_path / "run" / place)
    model.save_pretrained(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    loaded = HyperAdapterModel.from_pretrained(tmp_path / "moved")
    assert _answers(loaded) == _answers(loaded)
    loaded.save_pretrained(tmp_path / "other")
    assert torch.equal(
        HyperAdapterModel.from_pretrained(tmp_path / "other").method.prototypes.weight, model.method.prototypes.weight
    )


def test_a_backbone_on_the_hub_keeps_its_name(tmp_path: Path) -> None:
    model = HyperAdapterModel(tiny_backbone("bert"), make_model("bert").tasks, backbone_name="google-bert/bert-base")
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["backbone"]["name"] == "google-bert/bert-base"


def test_a_backbone_that_is_gone_is_named(tmp_path: Path) -> None:
    _from_folder(tmp_path / "bert").save_pretrained(tmp_path / "run")
    (tmp_path / "bert").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"its backbone '.*/bert' cannot be loaded: .* pass it as backbone="):
        HyperAdapterModel.from_pretrained(tmp_path / "run")
    backbone = AutoModel.from_pretrained(tmp_path / "moved", add_pooling_layer=False)
    HyperAdapterModel.from_pretrained(tmp_path / "run", backbone=backbone)


def test_what_is_no_readable_checkpoint_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file", str(tmp_path / "file")):
        with pytest.raises(CheckpointError, match="file: expected the folder of a checkpoint, found a file"):
            HyperAdapterModel.from_pretrained(name)
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(CheckpointError, match=f"{CONFIG_FILE}: cannot be read: .*Is a directory"):
        HyperAdapterModel.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        HyperAdapterModel.from_pretrained(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"no such folder|cannot be read"):
        HyperAdapterModel.from_pretrained(str(tmp_path / ("n" * 300)))
    with pytest.raises(CheckpointError, match=r"cannot be read: .*File name too long"):
        HyperAdapterModel.from_pretrained(tmp_path / ("n" * 300))


@pytest.mark.parametrize("make", [Path, str])
def test_a_revision_of_a_folder_is_refused(make: Any, run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"revision 'v1' .* which has none"):
        HyperAdapterModel.from_pretrained(make(run), backbone=tiny_backbone("bert"), revision="v1")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_model("bert").save_pretrained(tmp_path)
    return tmp_path


def _load(run: Path) -> HyperAdapterModel:
    return HyperAdapterModel.from_pretrained(run, backbone=tiny_backbone("bert"))


def test_another_backbone_is_refused_and_left_unwrapped(run: Path) -> None:
    other = tiny_backbone("bert", seed=5)
    with pytest.raises(CheckpointError, match=r"was trained on backbone 'None' with fingerprint.*found one with"):
        HyperAdapterModel.from_pretrained(run, backbone=other)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_backbone_of_another_type_is_refused(run: Path) -> None:
    with pytest.raises(BackboneError, match="backbone: expected a model, found 'bert'; load it first"):
        HyperAdapterModel.from_pretrained(run, backbone="bert")  # type: ignore[arg-type]


def test_truncated_weights_are_refused(run: Path) -> None:
    path = _weights_file(run)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"expected sha256 .* the file is truncated or altered"):
        _load(run)


def test_one_altered_byte_is_noticed(run: Path) -> None:
    path = _weights_file(run)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or altered"):
        _load(run)


def test_altered_tasks_are_noticed(run: Path) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    config["tasks"].reverse()
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="was altered after it was written"):
        _load(run)


def test_missing_parts_are_named(run: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here; expected a file hyperadapter\.json"):
        HyperAdapterModel.from_pretrained(tmp_path / "elsewhere")
    _weights_file(run).unlink()
    with pytest.raises(CheckpointError, match="the weights cannot be read"):
        _load(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable.*damaged"),
        ("[]", "fault"),
        ('{"format_version": 99}', r"has format 99, this library .* reads up to 10; upgrade"),
        ('{"format_version": 1, "tsks": []}', "tsks: unknown key. Did you mean 'tasks'"),
    ],
)
def test_a_damaged_or_newer_config_is_refused(run: Path, text: str, message: str) -> None:
    (run / CONFIG_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        _load(run)


def test_weights_outside_the_folder_are_refused(run: Path) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    config["weights"]["file"] = "../" + config["weights"]["file"]
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names no weights file in this folder"):
        _load(run)


@pytest.mark.parametrize(
    "name", ["../x", "a\0b", "\ud800", "", ".", "..", "/dev/zero", "adapters-x.safetensors", "n" * 300]
)
def test_a_weights_file_of_any_other_name_is_refused(name: str, run: Path) -> None:
    config = json.loads((run / CONFIG_FILE).read_text())
    config["weights"]["file"] = name
    (run / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"names no weights file in this folder|weights: file: expected valid Unicode"
    ):
        _load(run)


@pytest.mark.parametrize("depth", [101, 900, 100_000])
def test_json_of_any_depth_is_refused(depth: int, run: Path) -> None:
    (run / CONFIG_FILE).write_text('{"tasks": ' + "[" * depth + "]" * depth + "}")
    for read in (_load, stored_digest):
        with pytest.raises(CheckpointError, match="not readable: expected at most 100 levels of nested lists"):
            read(run)


@pytest.mark.parametrize("what", ["config", "weights", "tokenizer", "file of the tokenizer"])
def test_links_out_of_a_checkpoint_are_refused(what: str, tmp_path: Path) -> None:
    model, run = make_model("bert"), tmp_path / "run"
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(run)
    (tokenizer,) = run.glob("tokenizer-*")
    files = {
        "config": run / CONFIG_FILE,
        "weights": _weights_file(run),
        "tokenizer": tokenizer,
        "file of the tokenizer": tokenizer / "tokenizer.json",
    }
    moved = tmp_path / files[what].name
    files[what].rename(moved)
    files[what].symlink_to(moved)
    with pytest.raises(
        CheckpointError, match=rf"{files[what].name}: expected a file in the .* found a link out of it; copy"
    ):
        _load(run)
    files[what].unlink()
    moved.rename(run / "inside")
    files[what].symlink_to("inside" if what != "file of the tokenizer" else "../inside")
    if what in ("config", "weights"):
        assert _answers(_load(run)) == _answers(model)


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    model.save_pretrained(tmp_path / "run")
    snapshot = tmp_path / "models--user--name" / "snapshots" / "0123"
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir(parents=True)
    for number, (name, data) in enumerate(contents(tmp_path / "run").items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), (snapshot / name).parent))
    assert _answers(_load(snapshot)) == _answers(model)


@pytest.mark.parametrize("name", ["./../bert", "./link"])
def test_a_relative_backbone_outside_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    _from_folder(tmp_path / "bert").save_pretrained(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to("../bert")
    values, state = json.loads((tmp_path / "run" / CONFIG_FILE).read_text()), load_file(_weights_file(tmp_path / "run"))
    values["backbone"]["name"] = name
    _write(tmp_path / "run", values, state)
    with pytest.raises(
        CheckpointError, match=rf"its backbone '{name}' is not in this folder; load it from where it is"
    ):
        HyperAdapterModel.from_pretrained(tmp_path / "run")


def test_code_that_comes_with_a_backbone_is_not_run(tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "bert")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'trace')!r}, 'w')")
    with pytest.raises(BackboneError, match=r"(?s)cannot be loaded: .*custom code.*; load such a model yourself"):
        HyperAdapterModel.from_backbone(str(folder), [Task.regression("size")])
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("setting", ["adapter_dim", "prototype_dim", "hidden_dim", "shared_adapter_dim"])
def test_a_size_beyond_those_of_the_tensors_is_refused_before_memory_is_taken(setting: str, run: Path) -> None:
    values, state = json.loads((run / CONFIG_FILE).read_text()), load_file(_weights_file(run))
    values["model"][setting] = 10**9
    _write(run, values, state)
    with pytest.raises(CheckpointError, match=rf"model\.{setting}: expected at most \d+, .* found 1000000000; the"):
        _load(run)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("heads.starts", torch.tensor(1)),
        ("heads.wide_weight", torch.tensor(1.0)),
        ("heads.compares", torch.tensor(True)),
        ("heads.compares", torch.ones(5).bool()),
        ("method.own_adapters.9", torch.ones(1)),
        ("method.own_adapters.\u0663.x", torch.ones(1)),
        ("method.prototypes.centroids", torch.ones(3, 2)),
        ("method.thresholds", torch.ones(3, 1)),
    ],
)
def test_tensors_that_contradict_each_other_are_refused(name: str, tensor: Tensor, run: Path) -> None:
    values, state = json.loads((run / CONFIG_FILE).read_text()), load_file(_weights_file(run))
    backbone = tiny_backbone("bert")
    _write(run, values, {**state, "heads.single_weight": torch.ones(2, 2), name: tensor})
    with pytest.raises(CheckpointError, match="the weights do not fit the model that"):
        HyperAdapterModel.from_pretrained(run, backbone=backbone)
    assert all(parameter.requires_grad for parameter in backbone.parameters())


def _write(folder: Path, values: dict[str, Any], state: dict[str, Tensor]) -> None:
    """Put other contents into a checkpoint, with the checksums that belong to them."""
    described = {key: value for key, value in values.items() if key != "weights"}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
    weights = save(state, metadata={"config_sha256": digest})
    _weights_file(folder).write_bytes(weights)
    values["weights"]["sha256"] = hashlib.sha256(weights).hexdigest()
    (folder / CONFIG_FILE).write_text(json.dumps(values))


def _save_format_1(model: HyperAdapterModel, folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Write a checkpoint as the first format had it: a weight and a bias for each head, all keys of each task."""
    model.save_pretrained(folder)
    values = json.loads((folder / CONFIG_FILE).read_text())
    values["format_version"] = 1
    values["tasks"] = [task.model_dump(mode="json") for task in model.tasks]
    values["model"]["prototypes_per_task"] = values["model"].pop("centroids_per_task")
    stored = model.adapter_state_dict().items()
    state = {_old_name(name): value for name, value in stored if name not in NOT_IN_FORMAT_1}
    for task_id, head in enumerate([] if model.heads is None else model.heads.unpack()):
        state[f"heads.heads.{task_id}.weight"] = head.weight.clone()
        state[f"heads.heads.{task_id}.bias"] = head.bias.clone()
    _write(folder, values, state)
    return values, state


def _old_name(name: str) -> str:
    """The name that a parameter or buffer had before format 5."""
    renamed = {new: old for old, new in RENAMED_TENSORS.items()}
    return renamed.get(name, name.removeprefix("method."))


NOT_IN_FORMAT_1 = (
    "heads.weight",
    "heads.wide_weight",
    "heads.bias",
    "heads.starts",
    "heads.temperature",
    "heads.error_bounds",
    "method.adapter_scales",
)


def _with_parts_of_their_own(kind: str) -> HyperAdapterModel:
    """A model in which the first task has a wide head, and an adapter of its own, as after a few-shot fit."""
    model = make_model(kind)
    parts = model.task_table.states()
    adapter = model.method.adapters(torch.tensor([0]))
    parts[0].own_adapter = AdapterWeights({name: tensor + 0.1 for name, tensor in adapter.items()})
    if model.heads is not None:
        model.heads.set_target_scale(1, [1.0, 2.5, 7.0])
        parts = model.task_table.states()
        parts[0].head = Head(torch.randn(3, 2 * model.heads.hidden_size), torch.randn(3))
    model.task_table.replace(parts)
    return model.eval()


@pytest.mark.parametrize("version", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_checkpoints_of_earlier_versions_of_the_library_answer_as_they_did(version: int, tmp_path: Path) -> None:
    """The files were written by the last version of the library that had each format."""
    folder = RECORDED / "checkpoints" / f"format{version}"
    assert json.loads((folder / CONFIG_FILE).read_text())["format_version"] == version
    backbone = BertModel.from_pretrained(RECORDED / "checkpoints" / "backbone", add_pooling_layer=False)
    model = HyperAdapterModel.from_pretrained(folder, backbone=backbone)
    expected = load_file(folder / "expected.safetensors")
    batch = {name: expected[name] for name in ("input_ids", "attention_mask", "sequence_ids") if name in expected}
    logits = model(**batch, task_ids=expected["task_ids"]).logits
    largest = max(4.0, float(logits.detach().abs().masked_fill(logits.isinf(), 0).max()))
    torch.testing.assert_close(logits, expected["logits"].float(), rtol=0, atol=rounding(100, largest=largest))
    assert model.adapter_config.common_adapter == (version >= 6)
    assert model.adapter_config.token_dropout == 0
    assert torch.equal(model(**batch).task_ids, expected["routed"])
    if version == 4:
        assert model.tokenizer(["a", "b"])["input_ids"] == [[2], [3]]
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["format_version"] == 10
    again = HyperAdapterModel.from_pretrained(tmp_path, backbone=model.detach())
    assert again.adapter_state_dict().keys() == model.adapter_state_dict().keys()


def test_old_names_of_settings_and_tasks_in_a_checkpoint_are_read(tmp_path: Path) -> None:
    values = {"prototypes_per_task": 2, "head_inputs": "texts", "modules": {"layers": "blocks", "width": 16}}
    assert convert_settings(values) == {
        "centroids_per_task": 2,
        "head_inputs": "pair_features",
        "modules": {"layers": "blocks", "hidden_size": 16},
    }
    assert convert_settings({"head_inputs": "adapted"}) == {"head_inputs": "adapted"}
    assert convert_task({"name": "a", "label_words": {"x": "y"}}) == {"name": "a", "verbalizer": {"x": "y"}}


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("write", [_save_format_1, HyperAdapterModel.save_pretrained], ids=["1", "2"])
def test_both_formats_load_wide_heads_and_own_adapters(write: Any, kind: str, tmp_path: Path) -> None:
    model, batch = _with_parts_of_their_own(kind), make_batch(kind)
    write(model, tmp_path)
    loaded = HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone(kind))
    assert loaded.tasks == model.tasks
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.adapter_state_dict().keys() == model.adapter_state_dict().keys()


def test_a_model_goes_back_to_an_earlier_state(tmp_path: Path) -> None:
    model, batch = _with_parts_of_their_own("bert"), make_batch("bert")
    before = model(**batch).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for tensor in model.adapter_state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1.0)
    load_state(model, tmp_path)
    assert torch.equal(model(**batch).logits, before)
    assert not model.method.prototypes.centroids.any()


def test_training_is_not_resumed_from_a_state_of_format_1(tmp_path: Path) -> None:
    model = make_model("bert")
    _save_format_1(model, tmp_path)
    with pytest.raises(CheckpointError, match=r"earlier version .* start it anew with --overwrite"):
        load_state(model, tmp_path)


def test_a_head_of_format_1_with_another_shape_is_refused(tmp_path: Path) -> None:
    values, state = _save_format_1(make_model("bert"), tmp_path)
    state["heads.heads.2.weight"] = torch.zeros(3, 16)
    _write(tmp_path, values, state)
    with pytest.raises(CheckpointError, match=r"do not fit the model .* the head of task 2: expected a weight"):
        _load(tmp_path)
    del state["heads.heads.2.weight"]
    _write(tmp_path, values, state)
    with pytest.raises(CheckpointError, match=r"do not fit the model .*heads\.heads\.2\.weight"):
        _load(tmp_path)


def test_keys_are_in_the_file_where_a_task_has_some(tmp_path: Path) -> None:
    model = make_model("bert")
    empty_centroids(model)[1] = 0.5
    model.save_pretrained(tmp_path)
    assert torch.equal(_load(tmp_path).method.prototypes.centroids, model.method.prototypes.centroids)


def test_a_task_is_one_line_without_what_is_default(tmp_path: Path) -> None:
    tasks = [
        Task.classification("größe", ["a\n", '"b"'], verbalizer={"a\n": "x", '"b"': "y"}),
        Task.regression("r", fields=["text", "text_pair"], metrics=["spearman", "pearson"], step=0.5),
    ]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks)
    model.save_pretrained(tmp_path)
    lines = (tmp_path / CONFIG_FILE).read_text(encoding="utf-8").splitlines()
    start = lines.index('  "tasks": [')
    assert "größe" in lines[start + 1]
    assert "template" not in lines[start + 1]
    assert lines[start + 3] == "  ],"
    assert _load(tmp_path).tasks == model.tasks == tuple(tasks)


def test_a_checkpoint_from_before_routing_was_calibrated_still_loads(tmp_path: Path) -> None:
    model, batch = make_model("bert"), make_batch("bert")
    values, state = _save_format_1(model, tmp_path)
    del values["lengths"], values["model"]["features"], values["model"]["prototypes_per_task"]
    del state["thresholds"], state["prototypes.keys"]
    _write(tmp_path, values, state)
    loaded = _load(tmp_path)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert all(result.accepted for result in decide(loaded, torch.randn(4, 3), torch.ones(4).bool()))


def test_the_adapter_of_a_task_with_other_shapes_is_refused(tmp_path: Path) -> None:
    model = make_model("bert")
    small = make_model("bert", adapter_dim=2)
    parts = model.task_table.states()
    parts[0].own_adapter = small.method.adapters(torch.tensor([0]))
    model.task_table.replace(parts)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="the adapter of task 0 has other shapes"):
        HyperAdapterModel.from_pretrained(tmp_path, backbone=tiny_backbone("bert"))
