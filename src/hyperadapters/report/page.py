"""The page of a report: one HTML file that loads nothing from elsewhere. All texts from outside are escaped."""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.resources import files

from hyperadapters.report.charts import Figure, Report, Table
from hyperadapters.report.plotly_figures import plotly_figure, template_of
from hyperadapters.utils.optional import require
from hyperadapters.utils.texts import printable

TEMPLATES = {
    "light": template_of(text="#1a1a1a", grid="#dddddd", background="#ffffff"),
    "dark": template_of(text="#eeeeee", grid="#444444", background="#222222"),
}
"""Colours of figures on a light and on a dark background, which are those of the page."""


def check_packages() -> None:
    """Check before a long computation that a page can be made.

    Raises:
        MissingPackageError: If Plotly or jinja2 is not installed.
    """
    require("plotly")
    require("jinja2")


def as_page(report: Report) -> str:
    """Return a report as a page.

    Args:
        report: The report.

    Raises:
        MissingPackageError: If Plotly or jinja2 is not installed.
    """
    library, jinja2 = require("plotly.offline").get_plotlyjs(), require("jinja2")
    resources = files("hyperadapters.report")
    script = (resources / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["printable"] = lambda text: "\n".join(map(printable, text.split("\n")))
    environment.tests["figure"] = lambda item: isinstance(item, Figure)
    environment.tests["table"] = lambda item: isinstance(item, Table)
    template = environment.from_string((resources / "page.html.jinja").read_text(encoding="utf-8"))
    charts = {chart.name: plotly_figure(chart) for chart in report.charts}
    page: str = template.render(
        report=report,
        charts=_json_in_html({"templates": TEMPLATES, "figures": charts}),
        scripts=[library, script],
        script_sources=" ".join(map(_source, (library, script))),
    )
    return page


def _json_in_html(values: object) -> str:
    """Return JSON that cannot end a script element, whatever its texts are."""
    text = json.dumps(values, allow_nan=False, separators=(",", ":"))  # escapes everything outside of ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _source(script: str) -> str:
    """Return what allows a script in the content security policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
