"""The catalogue of known tasks, which recipes refer to by name. Its entries are YAML files in `catalogue/`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from hyperadapters.errors import RecipeError, did_you_mean

REPLACED = {
    "path": ("dataset", "subset", "splits", "demo"),
    "demo": ("path", "dataset", "subset", "splits", "delimiter"),
    "dataset": ("path", "demo", "delimiter"),
    "label_names": ("class_names",),
}
"""For each setting of a source, the settings of an entry's source that do not apply if a recipe gives this one."""


@dataclass(frozen=True)
class CatalogueEntry:
    """A known task.

    Attributes:
        name: Name of the group and of the task, such as "glue/mnli".
        summary: What the task is.
        note: Where the entry is an approximation of the task, or what has to be done to get its data.
        values: Values of a task in a recipe.
    """

    name: str
    summary: str
    note: str | None
    values: dict[str, Any]


def catalogue() -> dict[str, CatalogueEntry]:
    """Return all entries of the catalogue by name, ordered by group."""
    return {name: entry for group in _groups() for name, entry in _read_group(group).items()}


def find_entry(name: str) -> CatalogueEntry:
    """Return an entry of the catalogue.

    Args:
        name: Name of the entry, such as "glue/mnli".

    Raises:
        RecipeError: If there is no such entry.
    """
    group = name.partition("/")[0]
    found = _read_group(group).get(name) if group in _groups() else None
    if found is None:
        raise RecipeError(
            f"there is no task '{name}' in the catalogue.{did_you_mean(name, catalogue())} The command "
            "`hyperadapters tasks` lists all of them"
        )
    return found


def expand(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a task with those that they leave to the catalogue.

    Each key of the task replaces that of the entry, and so does each key of its `source`.

    Args:
        values: Values of a task in a recipe. They are returned as they are if they have no text as `catalogue`.

    Raises:
        RecipeError: If `catalogue` is not the name of an entry.
    """
    name = values.get("catalogue")
    if not isinstance(name, str):
        return values
    entry = find_entry(name).values
    source, own = entry["source"], values.get("source", {})
    if not isinstance(own, dict):
        return {**entry, **values}
    replaced = {key for setting, keys in REPLACED.items() if own.get(setting) is not None for key in keys}
    kept = {key: value for key, value in source.items() if key not in replaced}
    return {**entry, **values, "source": {**kept, **own}}


@lru_cache
def _groups() -> list[str]:
    names = [path.name for path in (files("hyperadapters") / "catalogue").iterdir()]
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


@lru_cache
def _read_group(group: str) -> dict[str, CatalogueEntry]:
    from hyperadapters.config.reading import load_yaml

    text = (files("hyperadapters") / "catalogue" / f"{group}.yaml").read_text(encoding="utf-8")
    entries = {}
    for short, values in load_yaml(text)["tasks"].items():
        name = f"{group}/{short}"
        summary, note = values.pop("summary"), values.pop("note", None)
        if "labels" in values and "label_names" not in values["source"]:
            values["source"] = {**values["source"], "class_names": values["labels"]}
        entries[name] = CatalogueEntry(name, summary, note, {"name": short, **values})
    return entries
