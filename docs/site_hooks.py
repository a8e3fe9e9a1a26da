"""Hooks of the documentation site: files that pages link to, formulas, the command line, and llms.txt.

Links are written for the repository, such as `../CONTRIBUTING.md`. A file outside `docs/` that a page links to becomes
a part of the site under `repository/`: Markdown as a page, code as a page that shows it, a folder as a list of its
files, and anything else as it is. Formulas become MathML, which browsers show without a script. Zensical, the successor
of Material for MkDocs, does not run these hooks.
"""

from __future__ import annotations

import html
import os
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import typer
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from typer.cli import get_docs_for_click

from hyperadapters.cli import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
SHOWN = {".py": "python", ".toml": "toml", ".yaml": "yaml"}
"""Suffixes of the files that are shown as code, with their languages."""
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', flags=re.DOTALL)
OUTSIDE = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?\b(?:src|href)=\"((?:https?:)?//[^\"]+)\"")


def on_files(files: Files, config: Any) -> Files:
    """Add the reference of the command line, and all files outside `docs/` that pages link to."""
    commands = get_docs_for_click(obj=typer.main.get_command(app), ctx=typer.Context(typer.main.get_command(app)))
    files.append(File.generated(config, "reference/command-line.md", content=commands))
    waiting = [DOCS / file.src_uri for file in files.documentation_pages() if file.generated_by is None]
    while waiting:
        for target in _targets(waiting.pop()):
            if files.get_file_from_path(_uri(target)) is None:
                files.append(_file(target, config))
                waiting += [target] if target.suffix == ".md" else []
    return files


def on_env(env: Any, config: Any, files: Files) -> None:
    """Write the Markdown of the pages beside them, and the overview also as llms.txt."""
    for file in files.documentation_pages():
        if file.abs_src_path is not None:
            copy = Path(config["site_dir"], file.src_uri)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(_relinked(file.content_string, file), encoding="utf-8")
    shutil.copy(Path(config["site_dir"], "index.md"), Path(config["site_dir"], "llms.txt"))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Make the links of a page lead to the places of their files on the site."""
    return _relinked(markdown, page.file)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Convert the formulas of a page, which arithmatex has found, to MathML."""

    def to_mathml(formula: re.Match[str]) -> str:
        if formula[1] == "span":
            return convert(html.unescape(formula[2]))
        # A formula that is wider than a small screen is scrolled by itself.
        return f'<div style="overflow-x: auto">{convert(html.unescape(formula[2]), display="block")}</div>'

    return FORMULA.sub(to_mathml, content)


def on_post_build(config: Any) -> None:
    """Check that no page loads anything from another host."""
    for path in Path(config["site_dir"]).rglob("*.html"):
        for address in OUTSIDE.findall(path.read_text(encoding="utf-8")):
            raise PluginError(f"{path}: expected resources of the site only, found {urlparse(address).netloc}")


def _relinked(markdown: str, file: File) -> str:
    if file.abs_src_path is None:
        return markdown
    folder = Path(file.abs_src_path).parent

    def relink(link: re.Match[str]) -> str:
        target = (folder / link[1]).resolve()
        return os.path.relpath(_uri(target), Path(file.src_uri).parent) if target.exists() else link[1]

    return LINK.sub(relink, markdown)


def _targets(page: Path) -> set[Path]:
    """Return the files and folders outside `docs/` that a page links to."""
    targets = {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8"))}
    return {target for target in targets if target.exists() and DOCS not in target.parents}


def _uri(target: Path) -> str:
    """Return the place of a file among the sources of the site."""
    if DOCS in target.parents:
        return target.relative_to(DOCS).as_posix()
    name = f"repository/{target.relative_to(ROOT).as_posix()}"
    return f"{name}.md" if target.is_dir() or target.suffix in SHOWN else name


def _file(target: Path, config: Any) -> File:
    name = target.relative_to(ROOT).as_posix()
    if target.is_dir():
        items = [f"- `{path.name}`" for path in sorted(target.iterdir())]
        return File.generated(config, _uri(target), content="\n".join([f"# `{name}`", "", *items, ""]))
    if target.suffix in SHOWN:
        code = f"# `{name}`\n\n`````{SHOWN[target.suffix]}\n{target.read_text(encoding='utf-8')}`````\n"
        return File.generated(config, _uri(target), content=code)
    return File.generated(config, _uri(target), abs_src_path=str(target))
