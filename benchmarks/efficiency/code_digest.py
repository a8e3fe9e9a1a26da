"""A digest of the code that makes result rows, so that rows of different code can be told apart."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parents[1] / "src" / "hyperadapters"
FOLDERS = ("backbones", "config", "core", "data", "fewshot", "heads", "inference", "methods", "model", "training")
"""Parts of the package that compute something; not the command line, checkpoints, reports and exports."""
READERS = ("document_tables.py", "figures.py", "leakage_tables.py", "summary.py", "transfer_tables.py")
"""Modules beside this one that only read the rows."""
DIGITS = 12


def code_digest() -> str:
    """The first hexadecimal digits of the SHA-256 of the sources without comments, docstrings and layout."""
    own = (path for path in HERE.glob("*.py") if path.name not in READERS)
    return digest_of((*own, *(path for folder in FOLDERS for path in (PACKAGE / folder).rglob("*.py"))))


def digest_of(paths: Iterable[Path]) -> str:
    """The digest of some sources, in the order of their names."""
    found = hashlib.sha256()
    for path in sorted(paths):
        found.update(f"{path.parent.name}/{path.name}\n{statements(path.read_text())}\n".encode())
    return found.hexdigest()[:DIGITS]


def statements(source: str) -> str:
    """The statements of a module in one layout, without those that are only a string."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [child for child in node.body if not _is_string(child)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_string(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
        return False
    return isinstance(statement.value.value, str)
