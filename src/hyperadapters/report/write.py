"""Writing a report: what is read, and the page and the figures that are written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hyperadapters.errors import DataError
from hyperadapters.report.charts import Report
from hyperadapters.report.compare_report import compare_report
from hyperadapters.report.matplotlib_figures import write_figures
from hyperadapters.report.page import as_page, check_packages
from hyperadapters.report.result_rows import read_rows, rows_report
from hyperadapters.report.run_report import run_report
from hyperadapters.report.runs import read_run
from hyperadapters.utils.files import check_folder, check_target, making_folder, write_atomically
from hyperadapters.utils.optional import require


def write_report(paths: Sequence[Path], output: Path, figures: Path | None = None, compare: bool = False) -> Report:
    """Write the report on a finished run or on result rows, or a comparison of runs, from their files alone.

    Args:
        paths: Folder of a finished run, or JSON-lines file of result rows; or folders of runs that are compared.
        output: HTML file to write.
        figures: Folder to which each figure is written as PNG and SVG, too. Default: none are written.
        compare: Whether runs are compared. Default: False.

    Returns:
        The report.

    Raises:
        DataError: If a file is missing or has other contents, or the number of paths does not fit `compare`. Nothing is
            written.
        OutputError: If the report cannot be written.
        MissingPackageError: If Plotly or jinja2 is not installed, or matplotlib is needed and not installed.
    """
    check_packages()
    check_target(output, (".html",))
    if figures is not None:
        require("matplotlib")
        check_folder(figures)
    report = _report(paths, compare)
    page = as_page(report)
    if figures is not None:
        with making_folder(figures):
            write_figures(report.charts, figures)
    write_atomically(output, page.encode())
    return report


def _report(paths: Sequence[Path], compare: bool) -> Report:
    if compare:
        return compare_report([read_run(path) for path in paths])
    if len(paths) != 1:
        raise DataError(f"expected one run or file, found {len(paths)}; add --compare to compare runs")
    if paths[0].suffix == ".jsonl":
        return rows_report(paths[0], *read_rows(paths[0]))
    return run_report(read_run(paths[0]))
