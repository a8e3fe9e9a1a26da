"""Short forms of texts."""

from __future__ import annotations

import random
import re
from collections import Counter

from hyperadapters.data.examples import Example
from hyperadapters.data.short_forms import SHORT_FORMS, short_form, weights_with_short_forms, with_short_forms

TEXT = "Where is my parcel? It was due on Monday, said the e-mail; today is Friday."


def plain(text: str) -> list[str]:
    return re.sub(r"[^\w\s]", "", text).lower().split()


def forms_of(text: str, count: int = 300) -> list[str]:
    generator = random.Random(0)
    return [short_form(Example(0, text), generator).text for _ in range(count)]


def test_a_short_form_is_a_part_of_the_text() -> None:
    words = plain(TEXT)
    for form in forms_of(TEXT):
        found = plain(form)
        assert 2 <= len(found) <= len(words)
        assert any(words[start : start + len(found)] == found for start in range(len(words)))


def test_short_forms_differ_in_length_start_case_and_punctuation() -> None:
    forms = forms_of(TEXT)
    assert len(Counter(len(form.split()) for form in forms)) >= 10
    assert 0.5 < sum(form.lower().startswith("where") for form in forms) / len(forms) < 0.9
    assert 0.4 < sum(form == form.lower() for form in forms) / len(forms) < 0.8
    assert 0.4 < sum(re.search(r"[^\w\s]", form) is None for form in forms) / len(forms) < 0.9


def test_both_texts_of_a_pair_are_shortened_and_the_target_stays() -> None:
    generator = random.Random(0)
    forms = [short_form(Example(3, TEXT, TEXT, 1), generator) for _ in range(50)]
    assert all(form.task_id == 3 and form.target == 1 for form in forms)
    assert len({form.text_pair for form in forms}) > 10


def test_texts_of_a_word_or_none_stay_readable() -> None:
    assert set(forms_of("Hello")) == {"Hello", "hello"}
    assert set(forms_of("?!")) == {"?!"}
    assert set(forms_of("")) == {""}


def test_forms_follow_their_rows_and_are_the_same_with_the_same_seed() -> None:
    rows = [Example(0, TEXT), Example(1, "Two hours of fog.")]
    forms = with_short_forms(rows, seed=3)
    assert forms[:2] == rows
    assert [form.task_id for form in forms] == [0, 1] * (1 + SHORT_FORMS)
    assert forms == with_short_forms(rows, seed=3)
    assert forms != with_short_forms(rows, seed=4)
    assert len(weights_with_short_forms(2)) == len(forms)
