"""Texts as tokens, and what the frozen layers make of them, each computed once in a process and kept."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hyperadapters.backbones.text_features import sequence_rows
from hyperadapters.data.examples import Example
from hyperadapters.inference.batches import batches_by_length

Key = tuple[str, str | None]

PREFIX_BATCH_SIZE = 64


class Texts:
    """Tokens of examples, by their texts."""

    def __init__(self, tokenizer: Any, max_length: int, device: str) -> None:
        self.tokenizer, self.max_length, self.device = tokenizer, max_length, device
        self._known: dict[Key, dict[str, Tensor]] = {}
        self._texts_of_tokens: dict[Key, Tensor] = {}

    @property
    def separator(self) -> str:
        """What the tokenizer puts between the texts of a pair."""
        return self.tokenizer.sep_token or ""

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Number of tokens of each example."""
        self._read(examples)
        return [len(self._known[key_of(example)]["input_ids"]) for example in examples]

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Inputs of the backbone on the device, padded on the right [B, S]."""
        self._read(examples)
        rows = [self._known[key_of(example)] for example in examples]
        fill = {"input_ids": self.tokenizer.pad_token_id}
        return {
            name: pad_sequence([row[name] for row in rows], True, fill.get(name, 0)).to(self.device) for name in rows[0]
        }

    def batch_with_texts(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The same with the text of each token, as models need it that encode the texts of a pair by themselves."""
        batch = self.batch(examples)
        rows = [self._texts_of_tokens[key_of(example)] for example in examples]
        return {**batch, "sequence_ids": pad_sequence(rows, True, -1).to(self.device)}

    def _read(self, examples: Sequence[Example]) -> None:
        for example in missing_from(self._known, examples):
            tokens = self.tokenizer(*key_of(example), truncation=True, max_length=self.max_length)
            self._known[key_of(example)] = {name: torch.tensor(values) for name, values in tokens.items()}
            numbers = [-1 if number is None else number for number in tokens.sequence_ids()]
            self._texts_of_tokens[key_of(example)] = torch.tensor(numbers)


class States:
    """Hidden states of examples below the adapted layers of a frozen encoder, in float32, by their texts."""

    def __init__(self, backbone: nn.Module, texts: Texts, first_layer: int) -> None:
        """Nothing is computed yet.

        Args:
            backbone: an encoder with `embeddings` and `encoder.layer`.
            texts: give its inputs.
            first_layer: number of layers below the states; 0 for those of the embeddings.
        """
        self._prefix = with_layers(backbone, 0, first_layer).eval()
        self._texts = texts
        self._known: dict[Key | tuple[Key, int], Tensor] = {}

    @torch.no_grad()
    def prepare(self, examples: Sequence[Example]) -> None:
        """Compute the states of those examples that have none yet."""
        missing = missing_from(self._known, examples)
        for rows in batches_by_length(missing, PREFIX_BATCH_SIZE):
            inputs = self._texts.batch([missing[row] for row in rows])
            hidden = self._prefix(**inputs).last_hidden_state
            lengths = inputs["attention_mask"].sum(dim=1).tolist()
            for row, states, length in zip(rows, hidden, lengths, strict=True):
                self._known[key_of(missing[row])] = states[:length].clone()

    @torch.no_grad()
    def of_sequences(self, examples: Sequence[Example], sequences: Mapping[str, Tensor]) -> Tensor:
        """Hidden states of the texts of examples, each by itself, zeros where padded [R, S, d].

        Args:
            examples: B examples.
            sequences: those of `HyperAdapterModel.sequences` for them.
        """
        rows = sequence_rows(sequences)
        owners = list(range(len(examples))) if rows is None else rows.tolist()
        keys = [_text_key(examples[row], int(place >= len(examples))) for place, row in enumerate(owners)]
        missing = [place for place, key in enumerate(keys) if key not in self._known]
        lengths = sequences["attention_mask"].sum(dim=1)
        if missing:
            longest = int(lengths[missing].max())
            inputs = {name: sequences[name][missing, :longest] for name in ("input_ids", "attention_mask")}
            for place, states in zip(missing, self._prefix(**inputs).last_hidden_state, strict=True):
                self._known[keys[place]] = states[: int(lengths[place])].clone()
        return pad_sequence([self._known[key] for key in keys], True)

    def batch(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
        """Hidden states, zeros where padded [B, S, d], and the attention mask [B, S]."""
        self.prepare(examples)
        rows = [self._known[key_of(example)] for example in examples]
        mask = pad_sequence([row.new_ones(len(row), dtype=torch.long) for row in rows], True)
        return pad_sequence(rows, True), mask


class HandOn(nn.Module):
    """Stands in the place of an encoder's embeddings, where hidden states are given."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """The given states."""
        return inputs_embeds


def key_of(example: Example) -> Key:
    """What the tokens and states of an example depend on."""
    return example.text, example.text_pair


def _text_key(example: Example, place: int) -> Key | tuple[Key, int]:
    """What the states of one text of an example depend on: a single text is the whole example."""
    return key_of(example) if example.text_pair is None else (key_of(example), place)


def missing_from(known: Container[Any], examples: Sequence[Example]) -> list[Example]:
    """One example of each text that is not known yet."""
    return list({key_of(example): example for example in examples if key_of(example) not in known}.values())


def with_layers(backbone: nn.Module, start: int, end: int | None = None) -> Any:
    """An encoder with some of the layers of another one, whose parameters it shares."""
    chosen: Any = frozen_copy(backbone)
    chosen.encoder.layer = chosen.encoder.layer[start:end]
    return chosen


def upper_layers(backbone: nn.Module, first_layer: int) -> Any:
    """The layers of an encoder above the first so many, which read hidden states given as `inputs_embeds`."""
    chosen = with_layers(backbone, first_layer)
    chosen.embeddings = HandOn()
    return chosen


def frozen_copy(backbone: nn.Module) -> Any:
    """A copy of the modules that shares the parameters, so that modules can be replaced in it."""
    return copy.deepcopy(backbone, {id(parameter): parameter for parameter in backbone.parameters()})
