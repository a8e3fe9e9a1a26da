"""Tasks: what travels with a checkpoint and stands in a recipe."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from hyperadapters.config.validation import Float, StrictModel, parse
from hyperadapters.errors import TaskError, unknown_name

Kind = Literal["classification", "regression", "text-to-text"]

METRICS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "text-to-text": ("exact_match",),
}


def normalize_label(label: str) -> str:
    """Return a label in Unicode's composed form, without spaces at its ends and without invisible characters."""
    visible = label.translate(dict.fromkeys(map(ord, "\u200b\u2060\ufeff")))
    return unicodedata.normalize("NFC", visible).strip()


class Task(StrictModel):
    """What is to be predicted from which texts, and how it is measured.

    Attributes:
        name: unique within a model; no path separators or control characters.
        kind: "classification" (one of `labels`), "regression" (a number) or "text-to-text" (any text).
        fields: `("text",)` or `("text", "text_pair")`.
        labels: of a classification task, in the order of the head's outputs. In a recipe they may be left out:
            they are then the sorted labels of the training rows.
        metrics: the first one is the task's score. "f1" is of the last of two labels; "macro_f1" is the mean over the
            labels that occur among the targets or the answers.
        template: how a text-to-text backbone reads the fields, for example "premise: {text} hypothesis: {text_pair}".
            Default: the fields with a space between them, which a row to be routed gets in any case.
        verbalizer: what a text-to-text backbone writes for each label. Default: the label itself.
        step: of a regression task: a text-to-text backbone writes the nearest multiple of it, for example 0.2.
    """

    name: str
    kind: Kind = "classification"
    fields: tuple[Literal["text", "text_pair"], ...] = ("text",)
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    template: str | None = None
    verbalizer: dict[str, str] | None = None
    step: Float | None = Field(None, gt=0)

    @classmethod
    def classification(cls, name: str, labels: list[str] | tuple[str, ...], **options: Any) -> Task:
        """A task whose answer is one of `labels`."""
        return parse(cls, {"name": name, "kind": "classification", "labels": labels, **options}, TaskError)

    @classmethod
    def regression(cls, name: str, **options: Any) -> Task:
        """A task whose answer is a number."""
        return parse(cls, {"name": name, "kind": "regression", **options}, TaskError)

    @classmethod
    def text_to_text(cls, name: str, **options: Any) -> Task:
        """A task whose answer is a text."""
        return parse(cls, {"name": name, "kind": "text-to-text", **options}, TaskError)

    @property
    def is_pair(self) -> bool:
        """Whether the input is a pair of texts."""
        return len(self.fields) == 2

    @property
    def main_metric(self) -> str:
        """The metric that is the task's score."""
        return self.metrics[0]

    def settings_of_texts(self) -> list[str]:
        """Settings that this task has and only backbones read that write their answers."""
        return [name for name in ("template", "verbalizer", "step") if getattr(self, name) is not None]

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.strip() or name != name.strip() or len(name) > 100:
            raise ValueError("expected 1 to 100 characters without spaces at the ends")
        # `isprintable` is quick, and false where any character has a category C.
        has_control = not name.isprintable() and any(unicodedata.category(char).startswith("C") for char in name)
        if has_control or "/" in name or "\\" in name or name in (".", ".."):
            raise ValueError("must not contain path separators or control characters")
        return name

    @field_validator("labels", mode="before")
    @classmethod
    def _check_label_types(cls, labels: object) -> object:
        if isinstance(labels, np.ndarray) and labels.ndim == 1:
            labels = labels.tolist()
        if not isinstance(labels, (list, tuple)):
            raise ValueError(f"expected a list of labels in order, found {type(labels).__name__}")
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(f"labels must be strings, found {labels!r}; put them in quotation marks")
        names = [normalize_label(label) for label in labels]
        for place, name in enumerate(names):
            if not name:
                raise ValueError(f"labels must have a visible character, found {labels[place]!r}")
            if names.index(name) < place:
                found = f"{labels[names.index(name)]!r} and {labels[place]!r}"
                raise ValueError(f"labels must be different from each other, found {found}")
        return names

    @field_validator("verbalizer", mode="after")
    @classmethod
    def _normalize_keys(cls, words: dict[str, str] | None) -> dict[str, str] | None:
        return None if words is None else {normalize_label(label): word for label, word in words.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.fields not in (("text",), ("text", "text_pair")):
            raise ValueError(f"fields must be [text] or [text, text_pair], found {list(self.fields)}")
        if self.labels and self.kind != "classification":
            raise ValueError(f"a {self.kind} task has no labels, found {len(self.labels)}: remove them or set kind")
        if len(self.labels) == 1:
            raise ValueError(f"a classification task needs at least two labels, found only '{self.labels[0]}'")
        if self.verbalizer is not None and self.kind != "classification":
            raise ValueError(f"verbalizer belong to a classification task, not to {self.kind}")
        if self.step is not None and self.kind != "regression":
            raise ValueError(f"step belongs to a regression task, not to {self.kind}")
        known = METRICS_OF_KIND[self.kind]
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(unknown_name(f"metric of a {self.kind} task", metric, known))
        if "f1" in self.metrics and len(self.labels) > 2:
            raise ValueError(f"f1 needs two labels, found {len(self.labels)}: use macro_f1")
        if self.template is not None:
            _check_template(self.template, self.fields)
        if self.verbalizer is not None and self.labels and set(self.verbalizer) != set(self.labels):
            raise ValueError(f"verbalizer must have one word for each of {list(self.labels)}")
        words = [word.strip() for word in (self.verbalizer or {}).values()]
        if len(set(words)) != len(words):
            raise ValueError("verbalizer must be different from each other")
        # In a model of thousands of tasks these take more memory than their prototypes: what is equal is kept once.
        object.__setattr__(self, "labels", _shared(self.labels))
        object.__setattr__(self, "metrics", _shared(self.metrics or (known[0],)))
        if type(self) is Task:  # a subclass has fields of its own
            object.__setattr__(self, "__pydantic_fields_set__", _FIELDS)
        return self


_FIELDS = set(Task.model_fields)


@lru_cache(maxsize=1024)
def _shared(values: tuple[str, ...]) -> tuple[str, ...]:
    return values


def _check_template(template: str, fields: tuple[str, ...]) -> None:
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if unknown := [name for name in used if name not in fields]:
            raise ValueError(f"found {{{unknown[0]}}}")
        template.format(**dict.fromkeys(fields, ""))  # whatever else follows the name
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"template may only use {{{'}, {'.join(fields)}}}: {error}") from error
    missing = [field for field in fields if field not in used]
    if missing:
        raise ValueError(f"template does not use {{{missing[0]}}}")


def check_task_names(tasks: tuple[Task, ...]) -> None:
    """Raise ValueError when there is no task or two have the same name."""
    names = [task.name for task in tasks]
    if not names:
        raise ValueError("expected at least one task, found none")
    if len(set(names)) < len(names):
        name, count = Counter(names).most_common(1)[0]
        raise ValueError(f"task names must be different from each other, found '{name}' {count} times")
