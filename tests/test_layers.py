"""Imports go downwards only, and the core knows nothing of transformers."""

from __future__ import annotations

import ast
from pathlib import Path

import hyperadapters

PACKAGE = Path(hyperadapters.__file__).parent
RANKS = {
    "_version": 0,
    "errors": 0,
    "optional": 1,
    "config": 1,
    "files": 1,
    "core": 2,
    "data": 2,
    "batch": 3,
    "hosts": 3,
    "merging": 4,
    "methods": 4,
    "objective": 4,
    "task_parts": 4,
    "model": 4,
    "checkpoint": 4,
    "inference": 5,
    "training": 6,
    "report": 7,
    "interop": 7,
    "demo": 8,
    "cli": 9,
    "__init__": 10,
}
SAME_RANK = {
    ("checkpoint", "methods"),
    ("checkpoint", "model"),
    ("checkpoint", "task_parts"),
    ("model", "merging"),
    ("model", "methods"),
    ("model", "objective"),
    ("model", "task_parts"),
}
# Methods of the model whose work is done above it, and for the eyes of the type checker only.
OFFERED = {
    ("hyperadapters.model.model", "hyperadapters.checkpoints.format"),
    ("hyperadapters.model.model", "hyperadapters.inference.routing"),
    ("hyperadapters.model.model", "hyperadapters.checkpoints.card"),
    ("hyperadapters.model.model", "hyperadapters.checkpoints.hub"),
    ("hyperadapters.model.model", "hyperadapters.fewshot.add_task"),
    ("hyperadapters.model.merging", "hyperadapters.model.model"),
    ("hyperadapters.methods.objective", "hyperadapters.model.model"),
    ("hyperadapters.model.tasks", "hyperadapters.model.model"),
}


def _unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def _modules() -> dict[str, Path]:
    return {
        ".".join(["hyperadapters", *path.relative_to(PACKAGE).with_suffix("").parts]): path
        for path in PACKAGE.rglob("*.py")
    }


def test_every_module_has_a_layer() -> None:
    assert {_unit(name) for name in _modules()} <= RANKS.keys()


def test_imports_go_downwards_only() -> None:
    upward = []
    for name, path in _modules().items():
        own = _unit(name)
        for imported in _imports(path):
            if not imported.startswith("hyperadapters"):
                continue
            other = _unit(imported)
            same = own == other or (own, other) in SAME_RANK
            if not same and not RANKS[other] < RANKS[own] and (name, imported) not in OFFERED:
                upward.append(f"{name} imports {imported}")
    assert upward == []


def test_what_the_model_offers_from_above_is_imported_when_it_is_called() -> None:
    for name, imported in OFFERED:
        tree = ast.parse(_modules()[name].read_text())
        direct = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert imported not in direct, f"{name} imports {imported} when it is loaded"


def test_the_core_needs_torch_only() -> None:
    allowed = {"__future__", "abc", "collections", "dataclasses", "math", "typing", "torch", "hyperadapters"}
    for name, path in _modules().items():
        if _unit(name) == "core":
            assert {imported.split(".")[0] for imported in _imports(path)} <= allowed, name


def test_the_core_can_be_read_in_one_sitting() -> None:
    lines = sum(len(path.read_text().splitlines()) for path in (PACKAGE / "core").glob("*.py"))
    assert lines <= 880  # two forms of adapters
