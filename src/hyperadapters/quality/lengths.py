"""Lengths of inputs in tokens, and how many of them are truncated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hyperadapters.quality.findings import MAX_EXAMPLES, CheckedRow, Finding, Lengths, RowExample
from hyperadapters.quality.rows import CheckedTask
from hyperadapters.utils.texts import counted

CHUNK = 1000
"""Number of inputs that are tokenised at a time."""
NOTABLE = 0.05
"""Share of truncated inputs from which on they are a warning."""


def check_lengths(data: CheckedTask, tokenizer: Any, max_length: int) -> tuple[Lengths, list[Finding]]:
    """Count the tokens of the inputs of a task, without the prompt of its template.

    Args:
        data: The task with its rows.
        tokenizer: Tokenizer of the backbone.
        max_length: Maximum number of tokens in training.

    Returns:
        The lengths, and a finding if inputs are truncated.
    """
    rows = data.rows
    tokens = _num_tokens(rows, tokenizer)
    long = np.flatnonzero(tokens > max_length)
    order = long[np.argsort(-tokens[long], kind="stable")]
    median, percentile = np.percentile(tokens, [50, 95], method="higher")
    lengths = Lengths(int(median), int(percentile), int(tokens.max()), max_length, len(long))
    if not len(long):
        return lengths, []
    share = len(long) / len(rows)
    finding = Finding(
        "truncated",
        "warning" if share >= NOTABLE else "info",
        data.task.name,
        len(long),
        f"{counted(len(long), 'row')} ({share:.1%}) longer than {max_length} tokens, of which the rest is not read. "
        f"The longest has {lengths.longest:,} tokens.",
        f"Raise data.max_length, for example to {lengths.percentile_95}, if the backbone has as many positions, or "
        "shorten the texts so that what matters comes first.",
        tuple(RowExample.of(rows[row], f"{tokens[row]} tokens") for row in order[:MAX_EXAMPLES]),
    )
    return lengths, [finding]


def _num_tokens(rows: Sequence[CheckedRow], tokenizer: Any) -> np.ndarray[Any, Any]:
    counts: list[int] = []
    for start in range(0, len(rows), CHUNK):
        texts = list(zip(*(row.texts for row in rows[start : start + CHUNK]), strict=True))
        # `verbose` off, because transformers would warn of each input that is longer than the backbone allows
        encoded = tokenizer(*map(list, texts), return_attention_mask=False, verbose=False)
        counts.extend(map(len, encoded["input_ids"]))
    return np.array(counts)
