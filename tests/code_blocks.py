"""Code blocks of documents: how they are found, and how those of a page are run in one folder, one after the other.

A block runs unless a comment directly before it says why it does not: `<!-- not run: needs a GPU -->`. Blocks of Python
share their variables within a page. In them, a line that is a comment as a whole is what the block prints; a comment
behind code is an explanation. In blocks of bash, `hyperadapters ...` runs in this process, files are written by
`cat > FILE <<'EOF'`, and lines of pip and make are compared with the extras and targets of the project.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import typer

from hyperadapters.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = ("python", "bash", "ini", "json", "nginx", "text", "yaml")
REASON = re.compile(r"<!-- not run: (\S.*) -->")
HEREDOC = re.compile(r"^cat > (\S+) <<'EOF'\n(.*?)^EOF\n", flags=re.DOTALL | re.MULTILINE)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
COMMANDS: Any = typer.main.get_command(app)
CHECK_FAILED = 3
"""Exit code of `hyperadapters check` for data with errors."""


class Block(NamedTuple):
    """A code block of a page, with the number of its first line and the reason for which it does not run."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None

    @property
    def runs(self) -> bool:
        return self.language in ("python", "bash") and self.reason is None

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    blocks, before, start = [], "", None
    lines = page.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```"):
            if start is None:
                start = number
                continue
            reason = REASON.fullmatch(before)
            text = "\n".join([*lines[start + 1 : number], ""])
            blocks.append(Block(page, start + 2, lines[start][3:], text, reason[1] if reason else None))
            before, start = "", None
        elif start is None and line:
            before = line
    return blocks


def commands_of(block: Block) -> Iterator[list[str]]:
    """Split a block of bash into the words of its commands, without heredocs and comments."""
    for line in HEREDOC.sub("", block.text).replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def check_command(words: list[str]) -> None:
    """Check a command without running it: its arguments, or the extras and targets that it names."""
    if words[0] == "make":
        assert set(words[1:]) <= set(TARGETS)
    elif words[0] == "pip":
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for names in named for extra in names.split(",")} <= EXTRAS.keys()
    elif "hyperadapters" in words:  # also behind torchrun and accelerate
        name, *arguments = words[words.index("hyperadapters") + 1 :]
        COMMANDS.commands[name].make_context(name, arguments)


def run_bash(block: Block, cli: Callable[..., Any]) -> None:
    for name, text in HEREDOC.findall(block.text):
        Path(name).write_text(text, encoding="utf-8")
    for words in commands_of(block):
        check_command(words)
        if words[0] == "hyperadapters":
            result = cli(*words[1:])
            assert result.code == 0 or (words[1], result.code) == ("check", CHECK_FAILED), (block.place, result.err)
        else:
            assert words[0] in ("make", "pip"), f"{block.place}: say why '{words[0]}' is not run"


def run_python(block: Block, variables: dict[str, Any]) -> None:
    """Run a block and compare the lines that it prints itself, without those of a progress bar or a log."""
    printed: list[str] = []
    variables["print"] = lambda *values: printed.extend(" ".join(map(str, values)).splitlines())
    exec(compile("\n" * (block.line - 1) + block.text, str(block.page), "exec"), variables)
    expected = [line.removeprefix("# ") for line in block.text.splitlines() if line.startswith("# ")]
    assert printed == expected or not expected, block.place
