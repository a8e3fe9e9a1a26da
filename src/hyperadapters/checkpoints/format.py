"""The checkpoint format: a JSON file and a safetensors file, which are replaced atomically.

    hyperadapter.json              format, library version, backbone and its fingerprint, model, tasks, weights file
    adapters-<digest>.safetensors  all trained parameters, under their names in the model
    tokenizer-<digest>/            files of the tokenizer, if it differs from the one loaded by the backbone's name

The name of the weights file contains its digest, so writing a new file never changes the old one. Replacing the JSON
file is the single step that makes the new state current. A reader therefore sees either the old or the new state. Each
file contains a checksum of the other.

Fields of a task with the defaults of `Task` are omitted, so these defaults are part of the format. `conversion`
describes how tensors are stored, and reads checkpoints of older formats.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor, nn

from hyperadapters._version import __version__
from hyperadapters.backbones import checks
from hyperadapters.backbones.architectures import resolve_architecture
from hyperadapters.backbones.loading import absolute_name, fingerprint, load_backbone, load_tokenizer, tokenizer_files
from hyperadapters.checkpoints.conversion import (
    complete_state,
    convert_names,
    convert_settings,
    convert_task,
    make_room,
    stored_state,
)
from hyperadapters.checkpoints.details_file import forget_tasks
from hyperadapters.config import Dtype, Lengths, ModelConfig, StrictModel, Task, drop_settings_without_effect, parse
from hyperadapters.config.model import GENERATING
from hyperadapters.errors import (
    BackboneError,
    CheckpointError,
    ConflictError,
    OutputError,
    RecipeError,
)
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import locked, make_folder, making_folder, new_folder, write_atomically
from hyperadapters.utils.reading import is_file, is_folder, leads_outside, parse_json

FORMAT_VERSION = 10
OLDEST_RESUMABLE_FORMAT = 2
"""Oldest format of checkpoints from which training can be resumed."""
FIRST_WITH_PRESENT_NAMES = 5
CONFIG_FILE = "hyperadapter.json"
WEIGHTS_PATTERN = "adapters-*.safetensors"
WEIGHTS_NAME = "adapters-" + 12 * "[0-9a-f]" + ".safetensors"
TOKENIZER_PATTERN = "tokenizer-" + 12 * "[0-9a-f]"

TEMPORARY_PATTERN = "." + 16 * "[0-9a-f]" + ".tmp"
TEMPORARY_SECONDS = 60
"""Age from which on no process is writing a temporary file any more."""

_MISFITS = (LookupError, ValueError, TypeError, RuntimeError)
"""Errors of tensors whose names, shapes or types are not those of the model."""

logger = logging.getLogger(__name__)


class BackboneReference(StrictModel):
    """Reference to the backbone of a checkpoint.

    Attributes:
        name: Name on the Hub, absolute path of a folder, or "./" and a path relative to the checkpoint. It is None if
            the backbone was passed in memory and has no name.
        fingerprint: Fingerprint of the weights rounded to bfloat16.
        fingerprint_float16: Fingerprint of the weights rounded to float16; None in early checkpoints.
    """

    name: str | None
    fingerprint: str
    fingerprint_float16: str | None = None

    @classmethod
    def of(cls, model: HyperAdapterModel) -> BackboneReference:
        """Refer to the backbone of a model in its current state. If its weights have changed, a warning is logged.

        Args:
            model: The model.

        Returns:
            The reference.

        Raises:
            BackboneError: If the name of the backbone cannot be written.
        """
        if not model.is_merged and model.fingerprint.refresh(model.backbone):
            logger.warning(
                "the weights of the backbone have changed since the model was made, and a checkpoint does not contain "
                "them: save them with backbone.save_pretrained, and load the model with backbone="
            )
        values = {
            "name": model.backbone_name,
            "fingerprint": model.fingerprint.bfloat16,
            "fingerprint_float16": model.fingerprint.float16,
        }
        return parse(cls, values, BackboneError, "backbone")

    def is_of(self, model: HyperAdapterModel) -> bool:
        """Return whether a model has this backbone, in the same or another floating-point type.

        Args:
            model: The model.
        """
        return self.fingerprint == model.fingerprint.bfloat16 or self.fingerprint_float16 == model.fingerprint.float16


class WeightsReference(StrictModel):
    """Reference to the weights file of a checkpoint, with its checksum."""

    file: str
    sha256: str


class TokenizerReference(StrictModel):
    """Reference to the folder of the tokenizer of a checkpoint, with a checksum of all its files."""

    folder: str
    sha256: str


class CheckpointConfig(StrictModel):
    """Contents of the JSON file.

    Attributes:
        renamed: Name under which each renamed task was trained, by its present name. It is omitted from the file if no
            task has been renamed.
        revision: Number of changes of the tasks so far; 0 before format 8.
        versions: Revision at which each task was last changed, by name; 0 for tasks that are omitted.
    """

    format: Literal["hyperadapters"] = "hyperadapters"
    format_version: int
    library_version: str
    backbone: BackboneReference
    model: ModelConfig
    lengths: Lengths | None = None
    tasks: tuple[Task, ...]
    renamed: dict[str, str] = {}
    revision: int = 0
    versions: dict[str, int] = {}
    tokenizer: TokenizerReference | None = None
    weights: WeightsReference | None = None


def _digest(values: Mapping[str, Any]) -> str:
    """Return the checksum of all values of the JSON file except `weights`, which the weights file contains."""
    text = json.dumps({key: value for key, value in values.items() if key != "weights"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _values(config: CheckpointConfig) -> dict[str, Any]:
    """Return the values of the JSON file."""
    tasks = config.model_dump(mode="json", include={"tasks"}, exclude_defaults=True)
    values = config.model_dump(mode="json", exclude={"tasks", "weights"})
    if config.tokenizer is None:
        del values["tokenizer"]
    if not config.renamed:
        del values["renamed"]
    return {**values, **tasks}


def _text(values: Mapping[str, Any]) -> str:
    """Return the values as indented JSON, with one line for each task, because there may be thousands."""
    parts = []
    for key, value in values.items():
        if key == "tasks":
            lines = ",\n".join("    " + json.dumps(task, ensure_ascii=False) for task in value)
            parts.append(f'  "tasks": [\n{lines}\n  ]')
        else:
            parts.append(f'  "{key}": ' + json.dumps(value, ensure_ascii=False, indent=2).replace("\n", "\n  "))
    return "{\n" + ",\n".join(parts) + "\n}\n"


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder contains a checkpoint.

    Args:
        folder: The folder.
    """
    return is_file(folder / CONFIG_FILE)


def save_model(model: HyperAdapterModel, folder: Path, replaces: str | None = None) -> str:
    """Write a checkpoint of a model. An existing checkpoint in the folder is replaced.

    If the folder is that of a run, what it keeps of tasks that the model does not have any more is removed.

    Args:
        model: The model.
        folder: Folder to write to.
        replaces: Digest of the checkpoint that is replaced, as returned by this function. Default: any.

    Returns:
        Digest of the checkpoint, which identifies the contents of both files.

    Raises:
        ConflictError: If the checkpoint in the folder has another digest than `replaces`. It is unchanged.
        OutputError: If the folder cannot be written.
        BackboneError: If the tokenizer of the model is not a tokenizer of transformers.
    """
    tokenizer = changed_tokenizer(model)
    reference = BackboneReference.of(model)
    config = CheckpointConfig(
        format_version=FORMAT_VERSION,
        library_version=__version__,
        backbone=reference.model_copy(update={"name": _relative(reference.name, folder)}),
        model=model.adapter_config,
        lengths=model.lengths,
        tasks=model.tasks,
        renamed=model.task_table.renamed,
        revision=model.task_table.revision,
        versions=model.task_table.versions,
        tokenizer=_refer_to_tokenizer(tokenizer) if tokenizer else None,
    )
    values = _values(config)
    weights = safetensors.torch.save(stored_state(model), metadata={"config_sha256": _digest(values)})
    sha256 = hashlib.sha256(weights).hexdigest()
    name = f"adapters-{sha256[:12]}.safetensors"
    values["weights"] = WeightsReference(file=name, sha256=sha256).model_dump(mode="json")
    with making_folder(folder), locked(folder):  # two writers would remove each other's weights
        if replaces is not None and stored_digest(folder) != replaces:
            raise ConflictError(f"{folder}: the checkpoint was changed by another process; load it again")
        if tokenizer and config.tokenizer:
            _write_tokenizer(tokenizer, folder / config.tokenizer.folder)
        write_atomically(folder / name, weights)
        write_atomically(folder / CONFIG_FILE, _text(values).encode())
        _remove_old(folder, {name, config.tokenizer.folder if config.tokenizer else ""})
        forget_tasks(folder, {config.renamed.get(task.name, task.name) for task in config.tasks})
    return sha256


def stored_digest(folder: Path) -> str:
    """Return the digest of a checkpoint that is in a folder, as `save_model` does.

    Args:
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: If the JSON file is missing or damaged.
    """
    try:
        return str(parse_json(_read_text(folder))["weights"]["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG_FILE}: not readable: {error}; the checkpoint is damaged") from None


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint if there is one. Other files in the folder are kept.

    Args:
        folder: Folder of the checkpoint.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _remove_old(folder, kept=set())


def _remove_old(folder: Path, kept: set[str]) -> None:
    """Remove the files of earlier states. A file that cannot be removed is ignored, because it is not used."""
    for path in folder.glob(TEMPORARY_PATTERN):  # left by a process that was killed while it was writing
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > TEMPORARY_SECONDS:
                path.unlink()
    for path in (*folder.glob(WEIGHTS_PATTERN), *folder.glob(TOKENIZER_PATTERN)):
        if path.name not in kept:
            with suppress(OSError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def changed_tokenizer(model: HyperAdapterModel) -> dict[str, bytes] | None:
    """Return the files of the tokenizer of a model if it differs from the one loaded by the backbone's name.

    Args:
        model: The model.

    Returns:
        Contents of the files by name; None if the tokenizer does not differ.

    Raises:
        BackboneError: If the tokenizer is not a tokenizer of transformers.
    """
    if "tokenizer" not in vars(model):  # It has been neither loaded nor set.
        return None
    files = tokenizer_files(model.tokenizer)
    if model.backbone_name is not None:
        with suppress(BackboneError):
            if tokenizer_files(load_tokenizer(model.backbone_name)) == files:
                return None
    return files


def _refer_to_tokenizer(files: Mapping[str, bytes]) -> TokenizerReference:
    digest = hashlib.sha256()
    for name, contents in sorted(files.items()):
        digest.update(f"{name}\0{len(contents)}\0".encode() + contents)
    return TokenizerReference(folder=f"tokenizer-{digest.hexdigest()[:12]}", sha256=digest.hexdigest())


def _write_tokenizer(files: Mapping[str, bytes], folder: Path) -> None:
    try:
        if _read_files(folder) == files:
            return
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error}") from error
    with new_folder(folder) as new:
        for name, contents in files.items():
            make_folder((new / name).parent)
            write_atomically(new / name, contents)


def _read_files(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _relative(name: str | None, folder: Path) -> str | None:
    """Return the name of a backbone for a checkpoint.

    A folder inside the checkpoint becomes a relative path that starts with "./", so that both can be moved together.
    """
    if name is None or not Path(name).is_absolute():
        return name
    path, folder = Path(os.path.realpath(name)), Path(os.path.realpath(folder))
    return f"./{path.relative_to(folder).as_posix()}" if path.is_relative_to(folder) else name


def _backbone_name(name: str | None, folder: Path) -> str | None:
    """Return the name by which the backbone of a checkpoint is loaded, the reverse of `_relative`.

    Raises:
        CheckpointError: If it is a relative path that leads out of the checkpoint.
    """
    if name is None or not name.startswith("./") or not is_folder(folder / name):
        return name
    if leads_outside(folder, name):
        raise CheckpointError(
            f"{folder}: its backbone '{name}' is not in this folder; load it from where it is, and pass it as backbone="
        )
    return absolute_name(str(folder / name))


def load_model(folder: Path, backbone: nn.Module | None = None, dtype: Dtype | None = None) -> HyperAdapterModel:
    """Load the model of a checkpoint.

    Args:
        folder: Folder of the checkpoint.
        backbone: Backbone to load the checkpoint into. Default: the backbone is loaded by its name.
        dtype: Floating-point type of a backbone that is loaded. Default: the type in its files.

    Returns:
        The model, in evaluation mode.

    Raises:
        CheckpointError: If the checkpoint is missing, damaged, of a newer format, or of another backbone.
        BackboneError: If the backbone cannot be loaded.
    """
    if not isinstance(backbone, nn.Module | None):
        raise BackboneError(f"backbone: expected a model, found {backbone!r}; load it first, or leave it out")
    config, state = read_checkpoint(folder)
    name = _backbone_name(config.backbone.name, folder)
    if backbone is None:
        backbone = _load_backbone(folder, name, config.model, dtype)
    try:
        settings = checks.drop_settings_without_effect(
            config.model, resolve_architecture(backbone, config.model.modules)
        )
        model = HyperAdapterModel(backbone, config.tasks, settings, name, config.lengths)
    except (BackboneError, RecipeError):
        if (found := fingerprint(backbone)) != config.backbone.fingerprint:
            raise _of_another(folder, config.backbone, found) from None
        raise
    if not config.backbone.is_of(model):
        model.detach()
        raise _of_another(folder, config.backbone, model.fingerprint.bfloat16)
    try:
        set_state(model, config, state)
    except _MISFITS as error:
        model.detach()
        raise CheckpointError(
            f"{folder}: the weights do not fit the model that {CONFIG_FILE} describes: {error}"
        ) from None
    if config.tokenizer is not None:
        model.tokenizer = load_tokenizer(str(folder / config.tokenizer.folder))
    return model.eval()


def set_state(model: HyperAdapterModel, config: CheckpointConfig, state: dict[str, Tensor]) -> None:
    """Set all parameters and buffers of a model that has the tasks of a checkpoint.

    Args:
        model: The model.
        config: Contents of the JSON file.
        state: Tensors by name, changed in place.

    Raises:
        KeyError: If a name is missing or unknown.
        ValueError: If a tensor has another shape.
        LookupError: If tensors contradict each other, as in a checkpoint that was not written by this library.
        TypeError: If tensors contradict each other.
        RuntimeError: If tensors contradict each other.
    """
    complete_state(model, state)
    make_room(model, state)
    model.load_adapter_state_dict(state)
    model.task_table.restore(config.revision, config.versions, config.renamed)


def _load_backbone(folder: Path, name: str | None, config: ModelConfig, dtype: Dtype | None) -> nn.Module:
    if name is None:
        raise CheckpointError(f"{folder}: its backbone was passed in memory and has no name; pass it as backbone=")
    if (Path(name).is_absolute() or name.startswith(".")) and not is_folder(name):
        raise CheckpointError(
            f"{folder}: its backbone '{name}' cannot be loaded: there is no such folder; put it back there, or load it "
            "from where it is now and pass it as backbone="
        )
    return load_backbone(name, config.modules, dtype)


def _of_another(folder: Path, expected: BackboneReference, found: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: was trained on backbone '{expected.name}' with fingerprint {expected.fingerprint[:12]}, found one "
        f"with {found[:12]}; load it with the same weights and revision that it was trained with, or pass them as "
        "backbone="
    )


def load_state(model: HyperAdapterModel, folder: Path) -> None:
    """Load the weights of a checkpoint into a model with the same tasks, settings and backbone.

    Args:
        model: Model whose weights are replaced.
        folder: Folder of the checkpoint.

    Raises:
        CheckpointError: If the checkpoint is missing or damaged, or its tasks, settings or backbone differ from those
            of the model.
    """
    config, state = read_checkpoint(folder)
    if config.format_version < OLDEST_RESUMABLE_FORMAT:
        raise CheckpointError(
            f"{folder}: was written by an earlier version of the library, from whose checkpoints this version cannot "
            "resume: finish the run with that version, or start it anew with --overwrite"
        )
    found = (config.tasks, config.model, config.backbone.fingerprint)
    if found != (model.tasks, model.adapter_config, model.fingerprint.bfloat16):
        raise CheckpointError(f"{folder}: is of a model with other tasks, settings or another backbone")
    try:
        complete_state(model, state)
        model.load_adapter_state_dict(state)
    except _MISFITS as error:
        raise CheckpointError(f"{folder}: is of a model with other adapters or heads: {error}") from None


def read_checkpoint(folder: Path) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    """Read and check both files of a checkpoint.

    Args:
        folder: Folder of the checkpoint.

    Returns:
        Contents of the JSON file, and the tensors by name.

    Raises:
        CheckpointError: If a file is missing, damaged or of a newer format.
    """
    text = _read_text(folder)
    while True:
        try:
            return _check(text, folder)
        except CheckpointError:
            # Another process may have saved a checkpoint after the JSON file was read, and removed the old weights.
            if text == (text := _read_text(folder)):
                raise


def _check(text: bytes, folder: Path) -> tuple[CheckpointConfig, dict[str, Tensor]]:
    path = folder / CONFIG_FILE
    try:
        values: Any = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not readable: {error}; the checkpoint is damaged") from None
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: has format {version}, this library ({__version__}) reads up to {FORMAT_VERSION}; upgrade it"
        )
    digest = _digest(values) if isinstance(values, dict) else ""
    has_old_names = isinstance(version, int) and version < FIRST_WITH_PRESENT_NAMES
    config = _parse(values, str(path), has_old_names)
    _check_tokenizer(folder, config.tokenizer)
    state = _read_weights(folder, config, digest)
    _check_sizes(path, config.model, state)
    return config, convert_names(state) if has_old_names else state


def _check_sizes(path: Path, model: ModelConfig, state: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if a size is larger than every tensor, before memory for it is allocated."""
    largest = max((size for tensor in state.values() for size in tensor.shape), default=0)
    has_codes = model.method in GENERATING
    for name in ("adapter_dim", "shared_adapter_dim", "lora_rank", *(("prototype_dim", "hidden_dim") * has_codes)):
        if model.is_chosen(name) and getattr(model, name) > largest:
            raise CheckpointError(
                f"{path}: model.{name}: expected at most {largest}, the largest size of a tensor of the checkpoint, "
                f"found {getattr(model, name)}; the checkpoint is damaged"
            )


def _check_tokenizer(folder: Path, expected: TokenizerReference | None) -> None:
    """Raise CheckpointError if a file of the tokenizer is missing or altered."""
    if expected is None:
        return
    if not fnmatch(expected.folder, TOKENIZER_PATTERN):
        raise CheckpointError(f"{folder}: {CONFIG_FILE} names no tokenizer in this folder; the checkpoint is damaged")
    for path in (folder / expected.folder, *(folder / expected.folder).rglob("*")):
        _check_inside(folder, path.relative_to(folder).as_posix())
    try:
        found = _refer_to_tokenizer(_read_files(folder / expected.folder))
    except OSError as error:
        raise CheckpointError(f"{folder / expected.folder}: the tokenizer cannot be read: {error}") from None
    if found.sha256 != expected.sha256:
        raise CheckpointError(
            f"{folder / expected.folder}: expected the tokenizer with sha256 {expected.sha256[:12]}, found "
            f"{found.sha256[:12]}; a file is missing or altered: copy the folder again"
        )


def _parse(values: Any, where: str, has_old_names: bool) -> CheckpointConfig:
    tasks: Any = values.get("tasks") if isinstance(values, dict) else None
    if isinstance(tasks, list):
        # The tasks are converted to text first, so that the memory of thousands of dictionaries is freed in one piece.
        lines = [json.dumps(convert_task(task) if has_old_names else task) for task in tasks]
        tasks.clear()
        tasks.extend(map(_task, lines))
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        settings = convert_settings(values["model"]) if has_old_names else values["model"]
        # Up to format 5 there were no common adapter and no densities, which the preset "plus" has now. Files without
        # `token_dropout`, which may have any format, are those of models that were trained without it.
        former = {"common_adapter": False, "routing": "prototypes", "token_dropout": 0.0}
        values["model"] = drop_settings_without_effect({**former, **settings})
    return parse(CheckpointConfig, values, CheckpointError, where)


def _task(line: str) -> Any:
    """Return a task from JSON, or its values if they are invalid, so that the error is reported with its position."""
    values = json.loads(line)
    with suppress(ValidationError):
        return Task.model_validate(values)
    return values


def _read_text(folder: Path) -> bytes:
    path = folder / CONFIG_FILE
    _check_inside(folder, CONFIG_FILE)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: no checkpoint here; expected a file {CONFIG_FILE} in it") from None
    except NotADirectoryError:
        raise CheckpointError(f"{folder}: expected the folder of a checkpoint, found a file") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _check_inside(folder: Path, name: str) -> None:
    """Raise CheckpointError if a file of a checkpoint is a link that leads out of its folder."""
    if leads_outside(folder, name):
        raise CheckpointError(
            f"{folder / name}: expected a file in the folder of the checkpoint, found a link out of it; copy the file "
            "there"
        )


def _read_weights(folder: Path, config: CheckpointConfig, expected_digest: str) -> dict[str, Tensor]:
    """Read the weights of a checkpoint after comparing both checksums.

    Raises:
        CheckpointError: If the file is missing, truncated or altered, or does not belong to this JSON file.
    """
    if config.weights is None or not fnmatch(config.weights.file, WEIGHTS_NAME):
        raise CheckpointError(
            f"{folder}: {CONFIG_FILE} names no weights file in this folder; the checkpoint is damaged"
        )
    path = folder / config.weights.file
    _check_inside(folder, config.weights.file)
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: the weights cannot be read: {error}") from None
    if sha256 != config.weights.sha256:
        raise CheckpointError(
            f"{path}: expected sha256 {config.weights.sha256[:12]}, found {sha256[:12]}; "
            "the file is truncated or altered: copy it again"
        )
    try:
        with safetensors.safe_open(path, framework="pt") as weights:
            digest = (weights.metadata() or {}).get("config_sha256")
            state = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # RuntimeError: file not found
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from None
    if digest != expected_digest:
        raise CheckpointError(f"{folder}: {CONFIG_FILE} was altered after it was written: copy both files again")
    return state
