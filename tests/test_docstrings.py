"""Docstrings of the public interface: there is one everywhere, and its sections agree with the code.

What is checked, for every module, class, function and method whose name and whose class are public:

- There is a docstring.
- `Args`: a function with parameters has this section, and it has one entry for each parameter, in their order.
  `__init__` and `__call__` count as public methods; no other special method does.
- `Returns` (`Yields` for a generator): a function whose annotation is not None has this section, unless its summary
  says what it returns, which it does if it starts with one of the words in `SAYS_RESULT`. A property is described by
  its summary alone.
- `Raises`: has an entry for every class, and every parameter, that a `raise` statement in the function's own body
  names.
- A section may be replaced by one sentence, "The arguments, result and errors are those of `other`.", with those of the
  three words that are meant.
- Each section stands alone on its line, and each entry is "name: Complete phrase."

Commands are exempt from the sections: their docstrings are the help of the command line, and the annotations of their
parameters explain these.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "hyperadapters"
SAYS_RESULT = ("Return", "Compute", "Generate", "Yield", "Iterate", "Open")
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
NAMED_ENTRIES = ("Args", "Attributes", "Raises")
PUBLIC_SPECIAL = ("__init__", "__call__")

Function = ast.FunctionDef | ast.AsyncFunctionDef


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_public(name: str) -> bool:
    return name in PUBLIC_SPECIAL or not name.startswith("_")


def is_overload(node: ast.ClassDef | Function) -> bool:
    """Whether a function is a signature for type checkers, whose docstring is that of its implementation."""
    return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)


def public_nodes(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """The public classes and functions of a module or class, with their names."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and is_public(node.name) and not is_overload(node):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_nodes(node.body, f"{prefix}{node.name}.")


def sections_of(docstring: str) -> dict[str, list[str]]:
    """The lines of each section of a docstring, without their common indentation."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in docstring.splitlines():
        header = re.fullmatch(r"(\w+):", line)
        if header and header[1] in SECTIONS:
            current = found.setdefault(header[1], [])
        elif line and not line.startswith(" "):
            current = None
        elif current is not None and line:
            current.append(line.removeprefix("    "))
    return found


def entries_of(lines: list[str], named: bool = True) -> list[str]:
    """The entries of a section, each with its continuation lines joined; a section without names is one entry."""
    entries: list[str] = []
    for line in lines:
        if entries and (line.startswith(" ") or not named):
            entries[-1] += " " + line.strip()
        else:
            entries.append(line)
    return entries


def names_of(lines: list[str]) -> list[str]:
    return [entry.partition(":")[0] for entry in entries_of(lines)]


def parameters_of(function: Function) -> list[str]:
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    names = names[1:] if names[:1] in (["self"], ["cls"]) else names
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    return names + ([f"**{arguments.kwarg.arg}"] if arguments.kwarg else [])


def own_statements(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes in the body of a function, without those of functions defined in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, Function | ast.ClassDef | ast.Lambda):
            yield child
            yield from own_statements(child)


def raised_names(function: Function) -> set[str]:
    """The classes, and the parameters that hold a class, in the function's `raise` statements."""
    found = set()
    for node in own_statements(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = ast.unparse(node.exc.func).rpartition(".")[2]
            if name[:1].isupper() or name in parameters_of(function):
                found.add(name)
    return found


def decorators_of(function: Function) -> set[str]:
    return {ast.unparse(item.func if isinstance(item, ast.Call) else item) for item in function.decorator_list}


def replaced_sections(docstring: str) -> set[str]:
    """The words of a sentence "The arguments and errors are those of `other`."."""
    sentence = re.search(r"The ([a-z, ]+) (?:is|are) (?:that|those) of\s+`", " ".join(docstring.split()))
    return set(re.findall(r"\w+", sentence[1])) if sentence else set()


def faults_of_format(docstring: str) -> Iterator[str]:
    for header in re.findall(rf"^ *({'|'.join(SECTIONS)}): *\S.*$", docstring, re.MULTILINE):
        yield f"{header}: expected the entries on lines of their own"
    for header, lines in sections_of(docstring).items():
        for entry in entries_of(lines, header in NAMED_ENTRIES):
            named = re.fullmatch(r"(\*{0,2}\w+): (.*)", entry)
            if header in NAMED_ENTRIES and not named:
                yield f"{header}: expected 'name: Phrase.', found '{entry}'"
                continue
            phrase = named[2] if header in NAMED_ENTRIES and named else entry
            if phrase[0].islower():
                yield f"{header}: expected a capital letter at the start of '{phrase}'"
        if lines and not lines[-1].endswith((".", "`")):
            yield f"{header}: expected a full stop at the end of '{lines[-1].strip()}'"


def faults_of_function(function: Function, docstring: str) -> Iterator[str]:
    decorators, sections = decorators_of(function), sections_of(docstring)
    if decorators & {"app.command", "app.callback"}:
        return
    replaced, parameters = replaced_sections(docstring), parameters_of(function)
    documented = names_of(sections.get("Args", []))
    if documented != parameters and not ("arguments" in replaced and "Args" not in sections):
        yield f"Args: expected entries for {parameters}, found {documented}"
    returns = "None" if function.returns is None else ast.unparse(function.returns)
    says_result = docstring.split()[0] in SAYS_RESULT or {"property", "cached_property"} & decorators
    if returns != "None" and not says_result and not {"Returns", "Yields"} & {*sections} and "result" not in replaced:
        yield f"Returns: the function returns {returns}"
    raises = names_of(sections.get("Raises", []))
    if "errors" not in replaced and (missing := sorted(raised_names(function) - {*raises})):
        yield f"Raises: the function raises {missing}, found {raises}"


def faults_of_module(path: Path) -> list[str]:
    """What is wrong with the docstrings of a module, a line for each fault."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[tuple[str, ast.Module | ast.ClassDef | Function]] = [("module", tree), *public_nodes(tree.body)]
    faults = []
    for name, node in nodes:
        docstring = ast.get_docstring(node)
        if docstring is None or not docstring.strip("."):
            faults.append(f"{name}: no docstring")
            continue
        found = list(faults_of_format(docstring))
        if isinstance(node, Function):
            found += faults_of_function(node, docstring)
        faults += [f"{name}: {fault}" for fault in found]
    return faults


@pytest.mark.parametrize("module", sorted(MODULES))
def test_docstrings_of_a_module_are_complete(module: str) -> None:
    assert faults_of_module(MODULES[module]) == []


CORRECT = '''"""A module."""

class Shape:
    """A shape."""

    def __init__(self, size: int) -> None:
        """Make a shape.

        Args:
            size: Edge length in metres.

        Raises:
            ValueError: If the size is negative.
        """
        if size < 0:
            raise ValueError("size")

    def area(self) -> float:
        """Return the area in square metres."""

    @property
    def corners(self) -> int:
        """Number of corners."""

    def grown(self, size: int) -> float:
        """Make it larger. The arguments are those of `Shape`.

        Returns:
            The area in square metres.
        """

    def _private(self, a: int) -> int: ...
'''


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("", "", None),
        ('"""A module."""', "", "module: no docstring"),
        ('    """A shape."""', "    pass", "Shape: no docstring"),
        ('        """Number of corners."""', "        pass", "Shape.corners: no docstring"),
        ("size: Edge", "length: Edge", "Shape.__init__: Args: expected entries for ['size'], found ['length']"),
        (
            "size: int)",
            "size: int, b: int)",
            "Shape.__init__: Args: expected entries for ['size', 'b'], found ['size']",
        ),
        ("size: Edge", "size: edge", "Shape.__init__: Args: expected a capital letter at the start of 'edge length in"),
        ("in metres.", "in metres", "Shape.__init__: Args: expected a full stop at the end of 'size: Edge length in"),
        ("size: Edge", "size, b: Edge", "Shape.__init__: Args: expected 'name: Phrase.', found 'size, b: Edge length"),
        ("Args:\n            size", "Args: size", "Shape.__init__: Args: expected the entries on lines of their own"),
        ("ValueError: If", "TypeError: If", "Shape.__init__: Raises: the function raises ['ValueError'], found ['Type"),
        ("Return the area in", "Area in", "Shape.area: Returns: the function returns float"),
        (" The arguments are", " The errors are", "Shape.grown: Args: expected entries for ['size'], found []"),
        ("Returns:\n            The", "The", "Shape.grown: Returns: the function returns float"),
    ],
)
def test_each_rule_finds_its_fault(old: str, new: str, fault: str | None, tmp_path: Path) -> None:
    path = tmp_path / "shapes.py"
    path.write_text(CORRECT.replace(old, new, 1) if old else CORRECT, encoding="utf-8")
    found = faults_of_module(path)
    assert found == [] if fault is None else any(line.startswith(fault) for line in found)
