"""Short forms of texts: parts of them as people write them, in lower case or without punctuation.

The rows of a data set are often of one length and style. Routing that knows only these rows recognises the tasks by
length and style, and not by what the texts are about.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import replace

from hyperadapters.data.examples import Example

SHORT_FORMS = 2
"""Number of short forms of each row by which routing is fitted and calibrated."""
FORM_WEIGHT = 0.25
"""Weight of a short form relative to a row: the short forms of a row together count half as much as the row itself."""
_PUNCTUATION = re.compile(r"[^\w\s]")


def with_short_forms(examples: Sequence[Example], seed: int = 0) -> list[Example]:
    """Return examples followed by short forms of each of them.

    Args:
        examples: N examples.
        seed: Seed of the random choices. Default: 0.

    Returns:
        The N examples, followed by `SHORT_FORMS` times their N short forms.
    """
    generator = random.Random(seed)
    return [*examples, *(short_form(example, generator) for _ in range(SHORT_FORMS) for example in examples)]


def weights_with_short_forms(num_examples: int) -> list[float]:
    """Return the weights of the result of `with_short_forms`.

    Args:
        num_examples: Number N of examples.
    """
    return [1.0] * num_examples + [FORM_WEIGHT] * (SHORT_FORMS * num_examples)


def short_form(example: Example, generator: random.Random) -> Example:
    """Return a short form of an example: some consecutive words of each of its texts.

    The logarithm of the number of words is drawn uniformly, and at least two words are kept. Half of the forms begin as
    the text, the others anywhere. Half of them are in lower case, and half of them have no punctuation. A text without
    spaces is not shortened.

    Args:
        example: Example to shorten.
        generator: Generator of the random choices.
    """
    second = None if example.text_pair is None else _shortened(example.text_pair, generator)
    return replace(example, text=_shortened(example.text, generator), text_pair=second)


def _shortened(text: str, generator: random.Random) -> str:
    words = text.split()
    kept = min(len(words), max(2, round(len(words) ** generator.random())))
    start = generator.choice((0, generator.randint(0, len(words) - kept)))
    short = " ".join(words[start : start + kept])
    if generator.random() < 0.5:
        short = short.lower()
    if generator.random() < 0.5:
        short = _PUNCTUATION.sub("", short).strip() or short
    return short
