"""A cache of the outputs of the frozen layers, which lie below all trained parameters.

The last bits of the hidden states of a row depend on the length to which the row is padded, and on no other property
of its batch (on a CPU; a GPU may also choose its kernels by the number of rows). Rows are therefore always padded to
one of a few lengths here, whether or not the states are cached. As a result, training and validation with the cache
compute the same numbers as without it.
"""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import IO, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from hyperadapters.backbones.passes import FrozenOutput
from hyperadapters.backbones.text_features import mean_of_texts, sequence_rows
from hyperadapters.errors import BackboneError, OutputError, RecipeError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.training.sharding import num_processes, shared_file
from hyperadapters.utils.texts import shown_size

SHORTEST = 16
GIB = 2**30
PrefixPlace = Literal["auto", "memory", "file", "none"]
StoredDtype = Literal["float32", "float16"]


class FrozenPrefix:
    """Outputs of the frozen layers for given examples. The states of an example are computed when first needed.

    Processes that train together on one machine keep the states in a file that they share, so that they are computed
    and stored once.

    An example has one sequence of states, or two if each text of a pair passes through the backbone by itself (see
    `HyperAdapterModel.sequences`).

    An object can be used for several models with the same backbone one after the other (see `use`), because frozen
    layers never change.

    Attributes:
        place: Where the states are kept: "memory" (of a single process), "file" or "none".
        num_bytes: Size of the states of all examples in bytes.
    """

    def __init__(
        self,
        model: HyperAdapterModel,
        lengths: Sequence[int],
        place: PrefixPlace = "auto",
        dtype: StoredDtype = "float32",
        memory_gb: float = 4.0,
        folder: str | Path | None = None,
    ) -> None:
        """Allocate space for the states of the examples.

        Args:
            model: Model with frozen layers.
            lengths: Number of tokens of each of the N examples.
            place: Where the states are kept: "memory", "file", "none" or "auto" (default). "auto" keeps them in memory
                if they take at most `memory_gb`, else in a file if it takes less than half of the free disk space, else
                nowhere.
            dtype: Type in which the states are kept. Default: "float32". "float16" needs half the space and rounds.
            memory_gb: Maximum memory in GiB for "auto". Default: 4.
            folder: Folder of the file. The file is anonymous and disappears when the process ends. Default: the folder
                for temporary files.

        Raises:
            OutputError: If there is not enough space.
        """
        folder = Path(tempfile.gettempdir() if folder is None else folder)
        self._model, self._layers = model, _layers(model)
        self._starts = [0, *accumulate(length + _additional_tokens(model) for length in lengths)]
        stored: torch.dtype = getattr(torch, dtype)
        shape = self._starts[-1], model.hidden_size
        self.num_bytes = size_of_states(model, lengths, dtype)
        self.place = choose_place(place, self.num_bytes, memory_gb, folder, num_processes())
        self._hidden = _room(self.place, shape, stored, folder)
        self._pooled = _room(self.place, (len(lengths), shape[1]), torch.float32, folder)
        self._known = _room(self.place, (len(lengths), 1), torch.uint8, folder)
        self._size = len(lengths)
        self._form: tuple[torch.dtype, bool] | None = None
        """Type of the states, and whether there are pooled ones; None until this process has computed some."""
        config_of_backbone = getattr(model.backbone, "config", None)
        self._padding_id: int = getattr(config_of_backbone, "pad_token_id", 0) or 0  # RoBERTa derives positions from it

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._size

    def use(self, model: HyperAdapterModel) -> None:
        """Use another model for states that have not been computed yet. Cached states are kept.

        Args:
            model: Model with the same backbone and the same frozen layers.

        Raises:
            BackboneError: If the backbone or the frozen layers differ.
        """
        if _layers(model) != self._layers:
            raise BackboneError(
                "the cached states are of another backbone or of other frozen layers (settings feature_layer, "
                "features, frozen_encoder_layers, head_inputs and lengths); make a FrozenPrefix for this model"
            )
        self._model = model

    @property
    def bytes_in_memory(self) -> int:
        """Size in memory of the states of all examples, in bytes."""
        return self.num_bytes if self.place == "memory" else 0

    def describe(self) -> str:
        """Return a message for the log that says where the states are kept and how large they are."""
        where = {"memory": "kept in memory", "file": "kept in a file", "none": "computed again for each batch"}
        rows, tokens = self._size, self._starts[-1]
        size = f"{shown_size(self.num_bytes)} when full"
        return f"Frozen layers: the states of {rows:,} rows, {tokens:,} tokens, are {where[self.place]} ({size})."

    def __call__(self, rows: Sequence[int], inputs: Mapping[str, Tensor]) -> FrozenOutput:
        """Return the states of a batch, with zeros for padding.

        Args:
            rows: Indices of the B rows among the examples.
            inputs: Inputs of the backbone for these rows, by name, each [B, S] and padded on the right.

        Raises:
            RecipeError: If a state is not finite, for example because it exceeds the range of float16.
        """
        if self._hidden is None or self._known is None:
            return self._compute(self._model.sequences(inputs))
        missing = [place for place, row in enumerate(rows) if self._form is None or not self._known[row]]
        if missing:
            of_missing = self._model.sequences({name: tensor[missing] for name, tensor in inputs.items()})
            self._keep([rows[place] for place in missing], of_missing, self._compute(of_missing))
        return self._take(rows, self._model.sequences(inputs))

    def _compute(self, sequences: Mapping[str, Tensor]) -> FrozenOutput:
        mask = sequences["attention_mask"]
        inputs = {name: tensor for name, tensor in sequences.items() if name not in ("is_pair", "pair_rows")}
        sizes = [max(SHORTEST, 1 << (length - 1).bit_length()) for length in mask.sum(dim=1).tolist()]
        parts, order = [], []
        for size in sorted(set(sizes)):
            places = [place for place, own in enumerate(sizes) if own == size]
            parts.append(self._compute_padded({name: tensor[places] for name, tensor in inputs.items()}, size))
            order += places
        back = torch.tensor(order, device=mask.device).argsort()
        hidden = torch.cat([pad(part.hidden, (0, 0, 0, mask.shape[1] - part.hidden.shape[1])) for part in parts])[back]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        of_rows = mean_of_texts(torch.cat(pooled)[back], sequences) if pooled else None
        return FrozenOutput(hidden * mask[..., None].to(hidden.dtype), of_rows)

    def _compute_padded(self, inputs: Mapping[str, Tensor], size: int) -> FrozenOutput:
        length = inputs["attention_mask"].shape[1]
        size = min(size, self._model.max_tokens)
        fill = {"input_ids": self._padding_id, "sequence_ids": -1}
        found = self._model.forward_frozen_layers(
            **{name: pad(tensor, (0, size - length), value=fill.get(name, 0)) for name, tensor in inputs.items()}
        )
        return FrozenOutput(found.hidden[:, :length], found.pooled)

    def _keep(self, rows: Sequence[int], sequences: Mapping[str, Tensor], found: FrozenOutput) -> None:
        assert self._hidden is not None
        assert self._pooled is not None
        assert self._known is not None
        self._form = found.hidden.dtype, found.pooled is not None
        for sequence, (start, end) in enumerate(self._places(rows, sequences)):
            self._hidden[start:end] = found.hidden[sequence, : end - start]
            if not self._hidden[start:end].isfinite().all():
                raise RecipeError(
                    "prefix_cache_dtype: activations exceed the range of float16; use float32"
                    if self._hidden.dtype == torch.float16
                    else "the outputs of the frozen layers are not finite; check the backbone, and the setting fp16"
                )
        if found.pooled is not None:
            self._pooled[list(rows)] = found.pooled.float().cpu()
        self._known[list(rows)] = 1  # last, because other processes read what is known

    def _take(self, rows: Sequence[int], sequences: Mapping[str, Tensor]) -> FrozenOutput:
        assert self._hidden is not None
        assert self._pooled is not None
        assert self._form is not None
        dtype, has_pooled = self._form
        mask = sequences["attention_mask"]
        hidden = torch.zeros(*mask.shape, self._hidden.shape[1], dtype=self._hidden.dtype)
        for sequence, (start, end) in enumerate(self._places(rows, sequences)):
            hidden[sequence, : end - start] = self._hidden[start:end]
        pooled = self._pooled[list(rows)].to(mask.device) if has_pooled else None
        return FrozenOutput(hidden.to(mask.device, dtype), pooled)

    def _places(self, rows: Sequence[int], sequences: Mapping[str, Tensor]) -> list[tuple[int, int]]:
        """Return where the states of each sequence start and end. Those of an example's texts follow each other."""
        of_sequences = sequence_rows(sequences)
        places = range(len(rows)) if of_sequences is None else of_sequences.tolist()
        starts, found = [self._starts[row] for row in rows], []
        for place, length in zip(places, sequences["attention_mask"].sum(dim=1).tolist(), strict=True):
            found.append((starts[place], starts[place] + length))
            starts[place] += length
        return found


def _layers(model: HyperAdapterModel) -> tuple[object, ...]:
    """Return all values on which the states depend: weights, type, frozen layers and maximum number of tokens."""
    config = model.adapter_config
    layers = (config.feature_layer, config.features, config.frozen_encoder_layers, config.separates_texts)
    return model.fingerprint.bfloat16, str(next(model.backbone.parameters()).dtype), *layers, model.lengths.input


def _additional_tokens(model: HyperAdapterModel) -> int:
    """Return 1 if each text of a pair is encoded by itself, and therefore has a first special token of its own."""
    return int(model.adapter_config.separates_texts)


def size_of_states(model: HyperAdapterModel, lengths: Sequence[int], dtype: StoredDtype = "float32") -> int:
    """Return the size of the states of all examples in bytes, with those that the retriever reads.

    Args:
        model: Model with frozen layers.
        lengths: Number of tokens of each example.
        dtype: Type in which the states are kept. Default: "float32".
    """
    stored: torch.dtype = getattr(torch, dtype)
    tokens = sum(lengths) + _additional_tokens(model) * len(lengths)
    return (tokens * stored.itemsize + len(lengths) * torch.float32.itemsize) * model.hidden_size


def choose_place(place: PrefixPlace, num_bytes: int, memory_gb: float, folder: Path, processes: int) -> PrefixPlace:
    """Return where states are kept: the chosen place, or the one for "auto" as described for `FrozenPrefix`.

    Args:
        place: Chosen place.
        num_bytes: Size of the states in bytes.
        memory_gb: Maximum memory in GiB for "auto".
        folder: Folder of the file.
        processes: Number of processes that train together. Several processes share a file instead of memory.
    """
    if place == "memory" or (place == "auto" and num_bytes <= memory_gb * GIB):
        return "memory" if processes == 1 else "file"
    if place != "auto":
        return place
    return "file" if num_bytes < 0.5 * shutil.disk_usage(folder).free else "none"


def _allocate(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):  # detects a full disk now instead of crashing later
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.truncate(descriptor, size)


def _room(place: PrefixPlace, shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor | None:
    """Return a tensor for the states, in memory or in a file, or zeros of an integer type; None if they are not kept.

    Raises:
        OutputError: If there is not enough space.
    """
    if place == "none":
        return None
    size = max(1, shape[0] * shape[1] * dtype.itemsize)
    try:
        if place == "memory":
            return torch.empty(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)
        if num_processes() > 1:
            file: IO[bytes] = shared_file(folder, partial(_allocate, size=size))
        else:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - the mapping keeps it open
            _allocate(file.fileno(), size)
    except (OSError, RuntimeError) as error:
        where = "in memory" if place == "memory" else f"in {folder}"
        message = f"prefix_cache: not enough space {where} for {size / GIB:.2f} GiB of states of frozen layers: {error}"
        raise OutputError(message) from None
    return torch.frombuffer(mmap.mmap(file.fileno(), size), dtype=dtype, count=shape[0] * shape[1]).view(shape)
