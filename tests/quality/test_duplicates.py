"""Equal and almost equal inputs."""

from __future__ import annotations

import pytest

from hyperadapters.quality.duplicates import MAX_CANDIDATES, canonical, find_duplicates

SENTENCE = "The courier left my parcel with a neighbour two streets away"


def neighbours(*inputs: tuple[str, ...]) -> list[tuple[int, int]]:
    """Pairs of inputs that are almost equal, where no two are equal."""
    found = find_duplicates(inputs)
    assert found.group_of == list(range(len(inputs)))
    return sorted((a, b) for a, others in found.neighbours.items() for b in others if a < b)


def test_case_spaces_punctuation_and_compatible_characters_do_not_count() -> None:
    assert canonical("  Where's my PARCEL?!\n") == canonical("where s my parcel") == "where s my parcel"
    assert canonical("\ufb01lm \uff11") == "film 1"
    assert canonical("!!!") != canonical("???")
    assert canonical("café") != canonical("cafe")


def test_equal_inputs_have_one_group() -> None:
    found = find_duplicates([("A film.",), ("b",), ("a FILM",), ("a film", "b"), ("a", "film b")])
    assert found.group_of == [0, 1, 0, 2, 3]
    assert found.neighbours == {}


@pytest.mark.parametrize(
    "other",
    [
        SENTENCE.replace("courier", "postman"),
        SENTENCE.replace(" two", ""),
        f"Sadly {SENTENCE}",
        "Two streets away the courier left my parcel with a neighbour",
        SENTENCE.replace("parcel", "parcels"),
    ],
)
def test_a_changed_word_makes_an_almost_equal_input(other: str) -> None:
    assert neighbours((SENTENCE,), ("Something else is written in this one",), (other,)) == [(0, 2)]


def test_texts_on_the_same_subject_are_different() -> None:
    assert neighbours((SENTENCE,), ("My parcel is at the neighbour's, who lives two doors away",)) == []


def test_both_texts_of_a_pair_must_be_almost_equal_in_either_order() -> None:
    first, second = SENTENCE, "A man plays the guitar on a small stage"
    changed = second.replace("small", "big")
    assert neighbours((first, second), (first, "Nobody is there"), (first, changed), (changed, first)) == [
        (0, 2),
        (0, 3),
        (2, 3),
    ]


def test_a_single_text_is_never_almost_equal_to_a_pair() -> None:
    assert neighbours((f"{SENTENCE} {SENTENCE} x",), (SENTENCE, f"{SENTENCE} x")) == []


def test_very_many_variants_of_a_text_are_compared_with_some() -> None:
    found = find_duplicates([(f"{SENTENCE} {number}",) for number in range(MAX_CANDIDATES + 5)])
    assert found.capped == 4
    assert len(found.neighbours) == MAX_CANDIDATES + 5


def test_texts_without_letters_are_compared() -> None:
    assert find_duplicates([("",), ("  ",), ("?",), ("",)]).group_of == [0, 0, 1, 0]
