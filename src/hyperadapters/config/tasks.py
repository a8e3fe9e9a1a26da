"""Definitions of tasks, which are part of checkpoints and recipes."""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, field_validator, model_validator

from hyperadapters.config.validation import Float, StrictModel, parse
from hyperadapters.errors import TaskError, shown, unknown_name

Kind = Literal["classification", "multi-label", "regression", "text-to-text"]
LABEL_SEPARATOR = ";"
"""Separator of the labels of a multi-label task where they are one text, such as a cell of a CSV file."""

METRICS_OF_KIND: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "balanced_accuracy", "f1", "macro_f1", "matthews_correlation"),
    "multi-label": ("micro_f1", "macro_f1", "subset_accuracy"),
    "regression": ("pearson", "spearman"),
    "text-to-text": ("exact_match", "token_f1", "rouge_1", "rouge_2", "rouge_l"),
}


def normalize_label(label: str) -> str:
    """Return a label in the composed normal form of Unicode, without invisible characters and surrounding spaces.

    Args:
        label: Name of the label.
    """
    visible = label.translate(dict.fromkeys(map(ord, "\u200b\u2060\ufeff")))
    return unicodedata.normalize("NFC", visible).strip()


class Task(StrictModel):
    """Definition of a task: its inputs, its targets and its metrics.

    Attributes:
        name: Name, which is unique in a model and contains no path separators or control characters.
        kind: "classification" (default) to predict one of `labels`, "multi-label" to predict any number of them,
            "regression" to predict a number, or "text-to-text" to generate any text.
        fields: Fields of an input, `("text",)` (default) or `("text", "text_pair")`.
        labels: Labels of a classification or multi-label task in the order of the head's outputs, or a mapping of
            labels to `descriptions`. In a recipe the default is the sorted labels of the training rows.
        descriptions: Description of each label in one line, for tasks whose inputs are single texts. It is an example
            of its label, in the place of the name of the label. Default: none.
        metrics: Metrics, of which the first is the score of the task. "f1" is that of the second of two labels.
            "macro_f1" is the mean over the labels that occur among the targets or the predictions, and
            "balanced_accuracy" is the mean recall of the labels among the targets. If one of these two is the first
            metric of a classification task, the fits of heads give all labels the same total weight (preset "plus").
            "subset_accuracy" is the share of rows whose labels are all right. "token_f1" is the mean F1 of the words of
            an answer, as in SQuAD, and "rouge_1", "rouge_2" and "rouge_l" are F1 of words, pairs of words and the
            longest common subsequence (extra `rouge`). Default: "accuracy", "micro_f1",
            "pearson" or "exact_match", depending on the kind.
        template: Prompt of a text-to-text backbone, for example "premise: {text} hypothesis: {text_pair}". Default: the
            fields separated by a space, which is always the prompt of an input whose task is not given.
        verbalizer: Text that a text-to-text backbone generates for each label. Default: the label itself.
        step: Resolution of a regression task: a text-to-text backbone generates the nearest multiple of it, for
            example 0.2.
    """

    name: str
    kind: Kind = "classification"
    fields: tuple[Literal["text", "text_pair"], ...] = ("text",)
    labels: tuple[str, ...] = ()
    descriptions: dict[str, str] | None = None
    metrics: tuple[str, ...] = ()
    template: str | None = None
    verbalizer: dict[str, str] | None = None
    step: Float | None = Field(None, gt=0)

    @classmethod
    def classification(cls, name: str, labels: Sequence[str] | Mapping[str, str], **options: Any) -> Task:
        """Return the definition of a classification task.

        Args:
            name: Name of the task.
            labels: Labels in the order of the head's outputs, or a mapping of labels to their descriptions.
            **options: Further attributes of the task.

        Raises:
            TaskError: If the definition is invalid.
        """
        return parse(cls, {"name": name, "kind": "classification", "labels": labels, **options}, TaskError)

    @classmethod
    def multi_label(cls, name: str, labels: Sequence[str] | Mapping[str, str], **options: Any) -> Task:
        """Return the definition of a multi-label task, in which an input has any number of labels.

        Args:
            name: Name of the task.
            labels: Labels in the order of the head's outputs, at least one, or a mapping of labels to their
                descriptions.
            **options: Further attributes of the task.

        Raises:
            TaskError: If the definition is invalid.
        """
        return parse(cls, {"name": name, "kind": "multi-label", "labels": labels, **options}, TaskError)

    @classmethod
    def regression(cls, name: str, **options: Any) -> Task:
        """Return the definition of a regression task.

        Args:
            name: Name of the task.
            **options: Further attributes of the task.

        Raises:
            TaskError: If the definition is invalid.
        """
        return parse(cls, {"name": name, "kind": "regression", **options}, TaskError)

    @classmethod
    def text_to_text(cls, name: str, **options: Any) -> Task:
        """Return the definition of a text-to-text task.

        Args:
            name: Name of the task.
            **options: Further attributes of the task.

        Raises:
            TaskError: If the definition is invalid.
        """
        return parse(cls, {"name": name, "kind": "text-to-text", **options}, TaskError)

    @property
    def is_pair(self) -> bool:
        """Whether an input is a pair of texts."""
        return len(self.fields) == 2

    @property
    def is_labelled(self) -> bool:
        """Whether the answers to an input are among given labels."""
        return self.kind in ("classification", "multi-label")

    @property
    def is_multi_label(self) -> bool:
        """Whether an input has any number of labels."""
        return self.kind == "multi-label"

    @property
    def label_texts(self) -> list[str]:
        """Text of each label that is an example of it: its description, or its name with spaces for underscores.

        Empty if the inputs are pairs of texts, or a label has neither a description nor a name with letters.
        """
        texts = [(self.descriptions or {}).get(label, label.replace("_", " ")) for label in self.labels]
        return texts if not self.is_pair and all(any(map(str.isalpha, text)) for text in texts) else []

    @property
    def main_metric(self) -> str:
        """Metric that is the score of the task."""
        return self.metrics[0]

    def settings_of_texts(self) -> list[str]:
        """Return the names of the given settings that only have an effect with backbones that generate text."""
        return [name for name in ("template", "verbalizer", "step") if getattr(self, name) is not None]

    @model_validator(mode="before")
    @classmethod
    def _separate_descriptions(cls, values: Any) -> Any:
        """Split a mapping of labels to descriptions into two fields."""
        if not isinstance(values, dict) or not isinstance(values.get("labels"), Mapping):
            return values
        if values.get("descriptions") is not None:
            raise ValueError("descriptions: found labels with descriptions as well; remove one of them")
        labels = values["labels"]
        return {**values, "labels": list(labels), "descriptions": dict(labels)}

    @field_validator("name")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if not name.strip() or name != name.strip() or len(name) > 100:
            raise ValueError("expected 1 to 100 characters without spaces at the ends")
        # `isprintable` is fast, and False if any character has a category that begins with C.
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
            raise ValueError(f"labels must be strings, found {shown(labels)}; put them in quotation marks")
        names = [normalize_label(label) for label in labels]
        for place, name in enumerate(names):
            if not name:
                raise ValueError(f"labels must have a visible character, found {labels[place]!r}")
            if names.index(name) < place:
                found = f"{labels[names.index(name)]!r} and {labels[place]!r}"
                raise ValueError(f"labels must be different from each other, found {found}")
        return names

    @field_validator("verbalizer", "descriptions", mode="after")
    @classmethod
    def _normalize_keys(cls, texts: dict[str, str] | None) -> dict[str, str] | None:
        return None if texts is None else {normalize_label(label): text for label, text in texts.items()}

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.fields not in (("text",), ("text", "text_pair")):
            raise ValueError(f"fields must be [text] or [text, text_pair], found {list(self.fields)}")
        if self.labels and not self.is_labelled:
            raise ValueError(f"a {self.kind} task has no labels, found {len(self.labels)}; remove them or change kind")
        if len(self.labels) == 1 and self.kind == "classification":
            raise ValueError(
                f"a classification task needs at least two labels, found only '{self.labels[0]}'; add another one, or "
                "choose the kind multi-label"
            )
        if self.is_multi_label and (joined := [label for label in self.labels if LABEL_SEPARATOR in label]):
            raise ValueError(
                f"labels of a multi-label task must not contain '{LABEL_SEPARATOR}', which separates labels in cells; "
                f"found '{joined[0]}'"
            )
        if self.descriptions is not None:
            self._check_descriptions(self.descriptions)
        if self.verbalizer is not None and self.kind != "classification":
            raise ValueError(f"a verbalizer is only for classification tasks, found kind '{self.kind}'; remove it")
        if self.step is not None and self.kind != "regression":
            raise ValueError(f"a step is only for regression tasks, found kind '{self.kind}'; remove it")
        known = METRICS_OF_KIND[self.kind]
        for metric in self.metrics:
            if metric not in known:
                raise ValueError(unknown_name(f"metric of a {self.kind} task", metric, known))
        if "f1" in self.metrics and len(self.labels) > 2:
            raise ValueError(f"f1 requires two labels, found {len(self.labels)}; use macro_f1")
        if self.template is not None:
            _check_template(self.template, self.fields)
        if self.verbalizer is not None and self.labels and set(self.verbalizer) != set(self.labels):
            raise ValueError(
                f"verbalizer must have one text for each of {list(self.labels)}, found {list(self.verbalizer)}"
            )
        words = [word.strip() for word in (self.verbalizer or {}).values()]
        if len(set(words)) != len(words):
            raise ValueError(f"the texts of a verbalizer must be different from each other, found {words}")
        # In a model with thousands of tasks these take more memory than the prototypes, so that equal ones are shared.
        object.__setattr__(self, "labels", _shared(self.labels))
        object.__setattr__(self, "metrics", _shared(self.metrics or (known[0],)))
        if type(self) is Task:  # a subclass has further fields
            object.__setattr__(self, "__pydantic_fields_set__", _FIELDS)
        return self

    def _check_descriptions(self, descriptions: dict[str, str]) -> None:
        if not self.is_labelled or self.is_pair:
            raise ValueError(
                "descriptions of labels are only for classification and multi-label tasks of single texts, found kind "
                f"'{self.kind}' and fields {list(self.fields)}; remove them"
            )
        if set(descriptions) != set(self.labels):
            raise ValueError(
                f"descriptions must have one text for each of {list(self.labels)}, found {list(descriptions)}"
            )
        if not self.label_texts:
            raise ValueError(f"descriptions must have letters, found {list(descriptions.values())}")
        texts = [" ".join(text.split()) for text in descriptions.values()]
        if len(set(texts)) != len(texts):
            raise ValueError(f"descriptions must be different from each other, found {texts}")


_FIELDS = set(Task.model_fields)


@lru_cache(maxsize=1024)
def _shared(values: tuple[str, ...]) -> tuple[str, ...]:
    return values


def _check_template(template: str, fields: tuple[str, ...]) -> None:
    try:
        used = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        if unknown := [name for name in used if name not in fields]:
            raise ValueError(f"found {{{unknown[0]}}}")
        template.format(**dict.fromkeys(fields, ""))  # fails for anything that follows the name of a field
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"template may only use {{{'}, {'.join(fields)}}}: {error}") from error
    missing = [field for field in fields if field not in used]
    if missing:
        raise ValueError(f"template does not use {{{missing[0]}}}")


def check_task_names(tasks: tuple[Task, ...]) -> None:
    """Check that there is at least one task and that all names are different.

    Args:
        tasks: The tasks of a recipe or a model.

    Raises:
        ValueError: If there is no task or two tasks have the same name.
    """
    names = [task.name for task in tasks]
    if not names:
        raise ValueError("expected at least one task, found none")
    if len(set(names)) < len(names):
        name, count = Counter(names).most_common(1)[0]
        raise ValueError(
            f"task names must be different from each other, found '{name}' {count} times; choose another name"
        )
