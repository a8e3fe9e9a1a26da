"""Origins of the rows of tasks, and the tasks of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, Tag, field_validator, model_validator

from hyperadapters.config.catalogue import expand, find_entry
from hyperadapters.config.tasks import Task
from hyperadapters.config.validation import MAPPING, TEXT, Number, StrictModel, by_type

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")


class HeldOut(StrictModel, populate_by_name=True):
    """A split that consists of rows held out from another split.

    Attributes:
        from_split: Split from which the rows are held out; the key is `from`. Default: "train".
        size: Number of rows, or their fraction if it is below 1.
    """

    from_split: Split = Field("train", alias="from")
    size: Number

    @field_validator("size")
    @classmethod
    def _check_size(cls, size: float) -> float:
        if size <= 0:
            raise ValueError(f"expected a number above 0, found {size}")
        if size >= 1 and size != int(size):
            raise ValueError(f"expected a whole number of rows, or a fraction below 1; found {size}")
        return size


class Source(StrictModel):
    """Origin of the rows of a task: files, a data set of the Hugging Face Hub, or the demo data of this package.

    Exactly one of `path`, `dataset` and `demo` is required.

    Attributes:
        path: JSON-lines, CSV, TSV or Parquet files: a path that contains `{split}`, where the files of all splits that
            are not held out must exist; one file, from which the other splits are held out; or a file for each split.
            Relative paths are relative to the recipe.
        dataset: Name of a data set on the Hub, or a folder that `datasets.load_dataset` reads.
        subset: Configuration name of the data set, for example "sst2" of "nyu-mll/glue".
        splits: Name of the data set's split for each split, for example `{train: train, test: validation_matched}`.
        demo: Name of a task of the demo data.
        columns: Names of the columns for text, text_pair and label, if they differ from these. A name with braces is a
            text that contains values of columns, such as "premise: {premise} question: {question}". The parts of nested
            values are in brackets, such as "{answers[0]}" or "{choices[text][0]}", and a list is written with commas.
        class_names: Names of the classes in order, for data that have the index of a class as label: 0 is the first
            name, and a negative number is no label. Other labels are not changed, and neither are the labels of a data
            set that names its classes. Default: no label is an index.
        label_names: New names of the labels in the data, for example `{"0": negative, "1": positive}`.
        where: Values of columns, such as `{subset: SQuAD}`: all rows with other values are left out.
        skip_unlabelled: Whether rows without a label are left out. Default: they are errors.
        held_out: Splits that are held out from other splits, at random with the seed of the recipe.
        delimiter: Delimiter of CSV and TSV files. Default: a comma for CSV and a tab for TSV.
    """

    path: (
        Annotated[
            Annotated[str, Tag(TEXT)] | Annotated[dict[Split, str], Tag(MAPPING)],
            by_type("a path, or a path for each split"),
        ]
        | None
    ) = None
    dataset: str | None = None
    subset: str | None = None
    splits: dict[Split, str] | None = None
    demo: str | None = None
    columns: dict[Literal["text", "text_pair", "label"], str] = {}
    class_names: tuple[str, ...] = ()
    label_names: dict[str, str] | None = None
    where: dict[str, str] = {}
    skip_unlabelled: bool = False
    held_out: dict[Literal["validation", "test"], HeldOut] = {}
    delimiter: str | None = Field(None, min_length=1, max_length=1)

    @field_validator("label_names", mode="before")
    @classmethod
    def _name_as_in_data(cls, names: object) -> object:
        """Convert keys such as 0 and true, which YAML does not read as strings, to strings as they are in the data."""
        if not isinstance(names, dict):
            return names
        return {str(key).lower() if isinstance(key, bool) else str(key): name for key, name in names.items()}

    @model_validator(mode="after")
    def _check_one_origin(self) -> Self:
        given = [name for name in ("path", "dataset", "demo") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of path, dataset, demo; found {given or 'none'}")
        if self.dataset is None and (self.subset is not None or self.splits is not None):
            raise ValueError("subset and splits are only for dataset, which is not given; remove them")
        paths = self.path.values() if isinstance(self.path, dict) else [self.path or ""]
        if self.delimiter is not None and not all(path.lower().endswith((".csv", ".tsv")) for path in paths):
            raise ValueError("delimiter is only for a path that ends in .csv or .tsv, which is not given; remove it")
        if self.delimiter is not None and self.delimiter in '"\r\n':
            raise ValueError(f"delimiter must not be a quotation mark or a line end, found {self.delimiter!r}")
        return self


class TaskEntry(Task):
    """A task of a recipe, which has a source in addition to the attributes of `Task`.

    Attributes:
        catalogue: Name of an entry of the catalogue, such as "glue/mnli", which gives the attributes that are not given
            here. Those of `source` are replaced one by one.
        source: Origin of the rows.
    """

    catalogue: str | None = None
    source: Source

    @property
    def task(self) -> Task:
        """Definition of the task, without its source."""
        return Task(**{name: getattr(self, name) for name in Task.model_fields})

    def settings_of_texts(self) -> list[str]:
        """Return the given settings that only have an effect with backbones that generate text.

        Those of the catalogue are not among them, because its tasks are for all kinds of backbones.
        """
        entry = {} if self.catalogue is None else find_entry(self.catalogue).values
        return [name for name in super().settings_of_texts() if getattr(self, name) != entry.get(name)]

    @model_validator(mode="before")
    @classmethod
    def _fill_from_catalogue(cls, values: Any) -> Any:
        return expand(values) if isinstance(values, dict) else values
