"""The checkpoint format: a JSON file and a safetensors file, written so that a reader sees the old or the new state.

    hyperadapter.json              format, library version, backbone and its fingerprint, model, tasks, weights file
    adapters-<digest>.safetensors  everything trained, under the names of the model's parameters

The weights file carries its digest in its name, so writing a new one never touches the old; replacing the JSON file
is the one step that makes the new state current. Each file holds a checksum of the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from hyperadapters._version import __version__
from hyperadapters.config import Lengths, ModelConfig, StrictModel, Task, parse
from hyperadapters.core import BottleneckWeights
from hyperadapters.errors import CheckpointError
from hyperadapters.files import make_folder, write_atomically
from hyperadapters.hosts.backbone import load_backbone
from hyperadapters.model import HyperAdapterModel
from hyperadapters.task_parts import set_task_parts, task_parts

FORMAT_VERSION = 1
CONFIG_FILE = "hyperadapter.json"
_WEIGHTS_PATTERN = "adapters-*.safetensors"


class BackboneReference(StrictModel):
    """Which backbone a checkpoint belongs to; one that was given in memory may have no name."""

    name: str | None
    fingerprint: str


class WeightsReference(StrictModel):
    """The weights file of a checkpoint and its checksum."""

    file: str
    sha256: str


class CheckpointConfig(StrictModel):
    """Contents of the JSON file."""

    format: Literal["hyperadapters"] = "hyperadapters"
    format_version: int
    library_version: str
    backbone: BackboneReference
    model: ModelConfig
    lengths: Lengths | None = None
    tasks: tuple[Task, ...]
    weights: WeightsReference | None = None


def _digest(values: Mapping[str, Any]) -> str:
    """Checksum of the JSON file's values but the reference to the weights; stored inside the weights file."""
    text = json.dumps({key: value for key, value in values.items() if key != "weights"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds a checkpoint."""
    return (folder / CONFIG_FILE).is_file()


def save_model(model: HyperAdapterModel, folder: Path) -> None:
    """Write a checkpoint of a model into a folder, replacing one that is there.

    Raises:
        OutputError: the folder cannot be written.
    """
    config = CheckpointConfig(
        format_version=FORMAT_VERSION,
        library_version=__version__,
        backbone=BackboneReference(name=model.backbone_name, fingerprint=model.backbone_fingerprint),
        model=model.adapter_config,
        lengths=model.lengths,
        tasks=model.tasks,
    )
    state = {name: value.detach().cpu().contiguous() for name, value in model.adapter_state_dict().items()}
    weights = safetensors.torch.save(state, metadata={"config_sha256": _digest(config.model_dump(mode="json"))})
    sha256 = hashlib.sha256(weights).hexdigest()
    name = f"adapters-{sha256[:12]}.safetensors"
    config = config.model_copy(update={"weights": WeightsReference(file=name, sha256=sha256)})
    make_folder(folder)
    write_atomically(folder / name, weights)
    write_atomically(folder / CONFIG_FILE, (config.model_dump_json(indent=2) + "\n").encode())
    for old in folder.glob(_WEIGHTS_PATTERN):
        if old.name != name:
            with suppress(OSError):  # the new state is current by now, and a left-over file does no harm
                old.unlink()


def load_model(folder: Path, backbone: nn.Module | None = None) -> HyperAdapterModel:
    """Load a checkpoint into its backbone, or into one that is given.

    Raises:
        CheckpointError: it is missing, damaged, of a newer format, or of another backbone.
        BackboneError: the backbone cannot be loaded.
    """
    config = read_config(folder)
    state = read_weights(folder, config)
    if backbone is None:
        if config.backbone.name is None:
            raise CheckpointError(f"{folder}: its backbone was given in memory and has no name; pass it as backbone=")
        backbone = load_backbone(config.backbone.name)
    model = HyperAdapterModel(backbone, config.tasks, config.model, config.backbone.name, config.lengths)
    if model.backbone_fingerprint != config.backbone.fingerprint:
        model.detach()
        raise CheckpointError(
            f"{folder}: was trained on backbone '{config.backbone.name}' with fingerprint "
            f"{config.backbone.fingerprint[:12]}, found one with {model.backbone_fingerprint[:12]}; "
            "load it with the same weights and revision that it was trained with"
        )
    try:
        _add_missing(model, state)
        _make_room(model, state)
        model.load_adapter_state_dict(state)
    except (KeyError, ValueError, RuntimeError) as error:
        model.detach()
        raise CheckpointError(
            f"{folder}: the weights do not fit the model that {CONFIG_FILE} describes: {error}"
        ) from None
    return model.eval()


def _add_missing(model: HyperAdapterModel, state: dict[str, Tensor]) -> None:
    """Give the state of an early checkpoint what was not there yet: nothing was known of routing."""
    state.setdefault("thresholds", model.thresholds)
    state.setdefault("prototypes.keys", model.prototypes.keys)


@torch.no_grad()
def _make_room(model: HyperAdapterModel, state: Mapping[str, Tensor]) -> None:
    """Make places for what only some tasks have, own adapters and wide heads; the values are loaded after.

    Raises:
        ValueError: one of them has another shape than this model's.
    """
    device = model.thresholds.device
    shapes = [tensor.shape for tensor in model.adapters(torch.zeros(1, dtype=torch.long, device=device))]
    parts = task_parts(model)
    for task_id, part in enumerate(parts):
        own = [state.get(f"own_adapters.{task_id}.{name}") for name in BottleneckWeights._fields]
        if all(tensor is not None for tensor in own):
            part.own_adapter = BottleneckWeights(*(tensor.to(device) for tensor in own if tensor is not None))
            if [tensor.shape for tensor in part.own_adapter] != shapes:
                raise ValueError(f"the adapter of task {task_id} has other shapes than those of this model")
        weight = state.get(f"heads.heads.{task_id}.weight")
        if part.head is not None and weight is not None:
            labels, width = part.head.weight.shape
            if weight.shape == (labels, 2 * width):
                part.head = part.head._replace(weight=weight.to(device))
    set_task_parts(model, parts)


def load_state(model: HyperAdapterModel, folder: Path) -> None:
    """Load the weights of a checkpoint into the model that wrote it, or one like it.

    Raises:
        CheckpointError: it is missing or damaged, or its tasks, settings or backbone are not those of the model.
    """
    config = read_config(folder)
    found = (config.tasks, config.model, config.backbone.fingerprint)
    if found != (model.tasks, model.adapter_config, model.backbone_fingerprint):
        raise CheckpointError(f"{folder}: is of a model with other tasks, settings or another backbone")
    state = read_weights(folder, config)
    try:
        model.load_adapter_state_dict(state)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{folder}: is of a model with other adapters or heads: {error}") from None


def read_config(folder: Path) -> CheckpointConfig:
    """Read and check the JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing, not readable, or of a newer format.
    """
    values = _read_json(folder)
    path = folder / CONFIG_FILE
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version}, this library ({__version__}) reads up to {FORMAT_VERSION}; upgrade it"
        )
    return parse(CheckpointConfig, values, CheckpointError, str(path))


def _read_json(folder: Path) -> Any:
    path = folder / CONFIG_FILE
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint here; expected a file {CONFIG_FILE} in it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable: {error}; the checkpoint is damaged") from None
    return values


def read_weights(folder: Path, config: CheckpointConfig) -> dict[str, Tensor]:
    """Read the weights of a checkpoint after comparing both checksums.

    Raises:
        CheckpointError: the file is missing, truncated or altered, or does not belong to this JSON file.
    """
    if config.weights is None or Path(config.weights.file).name != config.weights.file:
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} names no weights file in this folder; the checkpoint is damaged"
        )
    path = folder / config.weights.file
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: the weights cannot be read: {error}") from None
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != config.weights.sha256:
        raise CheckpointError(
            f"{path}: expected sha256 {config.weights.sha256[:12]}, found {sha256[:12]}; "
            "the file is truncated or altered: copy it again"
        )
    try:
        state = safetensors.torch.load(data)
        with safetensors.safe_open(path, framework="pt") as file:
            digest = (file.metadata() or {}).get("config_sha256")
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    if digest != _digest(_read_json(folder)):
        raise CheckpointError(f"{folder}: {CONFIG_FILE} was altered after it was written: copy both files again")
    return state
