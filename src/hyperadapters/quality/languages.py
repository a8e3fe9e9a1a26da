"""Texts in another language than the rest of their task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import Any

from hyperadapters.quality.findings import MAX_EXAMPLES, Finding, RowExample
from hyperadapters.quality.rows import CheckedTask
from hyperadapters.utils.optional import require
from hyperadapters.utils.texts import counted

MIN_CONFIDENCE = 0.9
"""Probability from which on a language is believed. Short texts rarely reach it."""
MAIN_SHARE = 0.8
"""Share of the recognised texts from which on a language is the one of the task."""
MAX_CHARACTERS = 500
"""Number of characters of a text by which its language is recognised."""


class LanguageIdentifier:
    """Recognises the languages of texts with py3langid (Lui and Baldwin 2012, langid.py), which includes its model."""

    def __init__(self) -> None:
        """Load the model.

        Raises:
            MissingPackageError: If py3langid is not installed.
        """
        self._identifier = _load()

    def __call__(self, text: str) -> tuple[str, float]:
        """Recognise the language of a text.

        Args:
            text: Any text.

        Returns:
            ISO 639 code of the language, and its probability.
        """
        language, probability = self._identifier.classify(text[:MAX_CHARACTERS])
        return str(language), float(probability)


@cache
def _load() -> Any:
    """Decompress the model, which takes a second, once in a process."""
    langid = require("py3langid.langid")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)


def check_languages(data: CheckedTask, identify: LanguageIdentifier) -> Iterator[Finding]:
    """Find the texts of a task that are in another language than most of them.

    Args:
        data: The task with its rows.
        identify: Recognises the language of a text.

    Yields:
        A finding, if there are such texts, or if the task has several languages.
    """
    found = [(row, *identify(" ".join(row.texts))) for row in data.rows]
    sure = [(row, language, value) for row, language, value in found if value >= MIN_CONFIDENCE]
    counts = Counter(language for _, language, _ in sure)
    if len(counts) < 2:
        return
    main, most = counts.most_common(1)[0]
    if most < MAIN_SHARE * len(sure):
        shares = ", ".join(f"{language} {count / len(sure):.0%}" for language, count in counts.most_common(5))
        yield Finding(
            "languages",
            "info",
            data.task.name,
            len(sure),
            f"The texts are in several languages: {shares} of {counted(len(sure), 'recognised text')}.",
            "Choose a multilingual backbone, and look at the scores of each language.",
        )
        return
    foreign = sorted((item for item in sure if item[1] != main), key=lambda item: -item[2])
    yield Finding(
        "foreign",
        "warning",
        data.task.name,
        len(foreign),
        f"{counted(len(foreign), 'row')} in another language than {main}.",
        "Remove or translate them, unless such inputs will come in use and the backbone knows their language.",
        tuple(RowExample.of(row, f"{language} ({value:.2f})") for row, language, value in foreign[:MAX_EXAMPLES]),
    )
