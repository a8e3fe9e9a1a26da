"""Imports go downwards only, and the core knows nothing of transformers."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import hyperadapters

PACKAGE = Path(hyperadapters.__file__).parent
TESTS = Path(__file__).parent
RANKS = {
    "_version": 0,
    "errors": 0,
    "utils": 1,
    "config": 2,
    "core": 3,
    "data": 3,
    "runtime": 4,
    "heads": 4,
    "methods": 4,
    "backbones": 4,
    "model": 5,
    "checkpoints": 6,
    "inference": 7,
    "fewshot": 8,
    "training": 8,
    "report": 9,
    "interop": 9,
    "quality": 9,
    "demo": 10,
    "quickstart": 10,
    "serving": 10,
    "sklearn": 10,
    "sweep": 10,
    "client": 11,
    "__main__": 12,
    "cli": 11,
    "__init__": 12,
}
FACADE = {
    ("hyperadapters.model.model", f"hyperadapters.{module}")
    for module in (
        "checkpoints.card",
        "checkpoints.format",
        "checkpoints.hub",
        "fewshot.add_task",
        "fewshot.fit",
        "inference.predictor",
        "inference.routing",
        "training.calibration",
        "interop.pipeline",
        "training.text_heads",
    )
}
"""Methods of the model that call a higher layer, which they import when they are called."""


def _unit(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@cache
def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


@cache
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
            if own != other and not RANKS[other] < RANKS[own] and (name, imported) not in FACADE:
                upward.append(f"{name} imports {imported}")
    assert upward == []


def test_the_facade_imports_higher_layers_only_when_it_is_called() -> None:
    for name, imported in FACADE:
        tree = ast.parse(_modules()[name].read_text())
        direct = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert imported not in direct, f"{name} imports {imported} when it is loaded"


def test_no_modules_import_each_other() -> None:
    """Imports for the eyes of the type checker count too, those of the facade do not."""
    imports = {
        name: {found for found in _imports(path) if found in _modules() and (name, found) not in FACADE}
        for name, path in _modules().items()
    }
    while leaves := {name for name, found in imports.items() if not found & imports.keys()}:
        imports = {name: found for name, found in imports.items() if name not in leaves}
    assert sorted(imports) == []


def test_the_core_needs_torch_only() -> None:
    allowed = {"__future__", "abc", "collections", "dataclasses", "math", "typing", "torch", "hyperadapters"}
    for name, path in _modules().items():
        if _unit(name) == "core":
            assert {imported.split(".")[0] for imported in _imports(path)} <= allowed, name


def _loaded_with(module: str) -> set[str]:
    """All modules that are imported when a module is, as far as imports at the top of our modules tell."""
    found, waiting = set(), [module]
    while waiting:
        path = _modules().get(waiting.pop())
        for node in ast.parse(path.read_text()).body if path else ():
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            waiting += set(names) - found
            found.update(names)
    return found


def test_predicting_and_serving_do_not_load_what_only_training_needs() -> None:
    """Each of these packages takes more than half a second."""
    slow = {"accelerate", "datasets", "pandas", "peft", "pyarrow", "ray", "scipy.optimize", "scipy.stats", "sklearn"}
    for module in ("inference.predict_files", "serving.app", "serving.worker"):
        loaded = _loaded_with(f"hyperadapters.{module}")
        assert "hyperadapters.model.model" in loaded
        assert [name for name in sorted(loaded) if name in slow or name.split(".")[0] in slow] == []


def test_no_test_module_is_imported_by_another() -> None:
    """What several tests need is in the modules directly in tests/, such as helpers.py, and in fixtures."""
    found = [
        f"{path.relative_to(TESTS)} imports {imported}"
        for path in TESTS.rglob("*.py")
        for imported in _imports(path)
        if imported.split(".")[-1].startswith(("test_", "conftest"))
    ]
    assert found == []
