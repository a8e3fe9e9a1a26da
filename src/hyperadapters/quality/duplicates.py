"""Inputs that occur more than once: equal ones, and almost equal ones that MinHash finds.

Two inputs are equal if they differ only in case, spaces and punctuation. They are almost equal if the sets of their
character 4-grams within words have a Jaccard similarity of at least `MIN_SIMILARITY`, in both texts of a pair, in this
order or with its texts exchanged. Candidates come from locality-sensitive hashing of MinHashes (Broder 1997; Leskovec,
Rajaraman and Ullman, Mining of Massive Datasets, chapter 3), and each is then compared exactly.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hyperadapters.utils.optional import require
from hyperadapters.utils.progress import show_progress

MIN_SIMILARITY = 0.7
"""Jaccard similarity from which on two inputs are almost equal."""
PERMUTATIONS = (20, 5)
"""Number of bands and number of hash values in each, with which 97 % of pairs of similarity 0.7 are candidates."""
MAX_CHARACTERS = 1000
"""Number of characters of a text that are compared for near-duplicates."""
MAX_CANDIDATES = 100
"""Number of earlier inputs with which an input is compared, so that a million variants of one text take linear time."""
NGRAM = 4
FEATURES = 2**20
"""Number of different hash values of n-grams."""

Input = tuple[str, ...]


def canonical(text: str) -> str:
    """Return a text without differences in case, spaces and punctuation.

    A text without letters and digits only loses differences in spaces.

    Args:
        text: Text of a row.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.sub(r"[\W_]+", " ", folded).split()) or " ".join(folded.split())


@dataclass
class DuplicateGroups:
    """Which of a list of inputs are equal, and which are almost equal.

    Attributes:
        group_of: Number of the group of equal inputs to which each input belongs.
        neighbours: Groups that are almost equal to a group, with their similarity.
        capped: Number of groups that were only compared with the first `MAX_CANDIDATES` candidates.
    """

    group_of: list[int]
    neighbours: dict[int, dict[int, float]] = field(default_factory=dict)
    capped: int = 0


def find_duplicates(inputs: Sequence[Input]) -> DuplicateGroups:
    """Find equal and almost equal inputs.

    Args:
        inputs: Texts of the inputs. A single text is never a duplicate of a pair.

    Returns:
        The groups of equal inputs, in the order of their first input, and their neighbours.

    Raises:
        MissingPackageError: If datasketch is not installed.
    """
    numbers: dict[Input, int] = {}
    group_of = [numbers.setdefault(tuple(map(canonical, texts)), len(numbers)) for texts in inputs]
    found = DuplicateGroups(group_of)
    by_arity: dict[int, list[Input]] = defaultdict(list)
    for texts in numbers:
        by_arity[len(texts)].append(texts)
    for group in by_arity.values():
        _add_neighbours(group, numbers, found)
    return found


def _add_neighbours(inputs: Sequence[Input], numbers: dict[Input, int], found: DuplicateGroups) -> None:
    """Compare the different inputs with one number of texts, and add those that are almost equal."""
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        analyzer="char_wb", ngram_range=(NGRAM, NGRAM), n_features=FEATURES, binary=True, norm=None, lowercase=False
    )
    matrices = [vectorizer.transform(text[:MAX_CHARACTERS] for text in texts) for texts in zip(*inputs, strict=True)]
    grams = [_sets_of_grams(matrix) for matrix in matrices]
    for row, candidates in _candidates(grams):
        if len(candidates) > MAX_CANDIDATES:
            found.capped += 1
        for other in sorted(candidates)[:MAX_CANDIDATES]:
            similarity = _similarity([text[row] for text in grams], [text[other] for text in grams])
            if similarity >= MIN_SIMILARITY:
                first, second = numbers[inputs[row]], numbers[inputs[other]]
                found.neighbours.setdefault(first, {})[second] = similarity
                found.neighbours.setdefault(second, {})[first] = similarity


def _sets_of_grams(matrix: Any) -> list[np.ndarray[Any, Any]]:
    """Return the sorted hash values of the n-grams of each row of a sparse matrix."""
    matrix.sort_indices()
    return [matrix.indices[start:end] for start, end in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)]


def _candidates(grams: Sequence[Sequence[np.ndarray[Any, Any]]]) -> Iterator[tuple[int, list[int]]]:
    """Yield each input with the earlier ones that may be almost equal to it."""
    datasketch = require("datasketch")
    bands, rows = PERMUTATIONS
    index = datasketch.MinHashLSH(num_perm=bands * rows, params=PERMUTATIONS)
    empty = datasketch.MinHash(num_perm=bands * rows, hashfunc=int)
    for row in show_progress(range(len(grams[0])), "near-duplicates", len(grams[0])):
        values = np.concatenate([text[row] for text in grams])
        if not len(values):
            continue
        minhash = empty.copy()
        minhash.update_batch(values)
        yield row, index.query(minhash)
        index.insert(row, minhash, check_duplication=False)


def _similarity(first: Sequence[np.ndarray[Any, Any]], second: Sequence[np.ndarray[Any, Any]]) -> float:
    """Compute the lowest similarity of the texts of two inputs, in the better order of the texts of the second."""
    in_order = min(map(_jaccard, first, second))
    return in_order if len(first) == 1 else max(in_order, min(map(_jaccard, first, second[::-1])))


def _jaccard(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    common = len(np.intersect1d(first, second, assume_unique=True))
    union = len(first) + len(second) - common
    return common / union if union else 1.0
