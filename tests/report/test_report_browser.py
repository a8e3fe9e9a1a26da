"""The page of a report in a real browser, opened from disk: it is drawn, in light and dark, and nothing bad happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from typing import Any

import pytest
from written_runs import HOSTILE, run_values, write_values

from hyperadapters.report.page import as_page
from hyperadapters.report.run_report import run_report
from hyperadapters.report.runs import read_run

playwright_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("plotly", reason="the page needs the extra 'report'")
expect = playwright_api.expect


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A report on a run whose names and texts would do harm if they were not escaped."""
    folder = tmp_path_factory.mktemp("report")
    values = run_values(HOSTILE)
    for point, text in zip(values["details.json"]["points"], (HOSTILE[0], QUOTED), strict=False):
        point["text"] = text
    page = folder / "report.html"
    page.write_text(as_page(run_report(read_run(write_values(folder / "run", values)))), encoding="utf-8")
    return page.as_uri()


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page, in which no message of the console, no error, no dialog and no request may occur."""
    context = browser.new_context(**options)
    page, found = context.new_page(), []
    page.on("dialog", lambda dialog: (found.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("console", lambda message: found.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith((address, "data:", "blob:")) or found.append(request.url))
    page.goto(address)
    expect(page.locator("html")).to_have_attribute("data-drawn", options["color_scheme"])
    yield page
    context.close()
    assert found == []


QUOTED = 'He said "stop" & it\'s <b>done</b> &quot;'
"""A text with each character that HTML treats specially."""


def assert_drawn(page: Any, scheme: str, width: int) -> None:
    assert page.locator(".chart").count() == page.locator(".chart svg.main-svg:first-of-type").count() == 15
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#chart-scores .ytick text").first.text_content() == HOSTILE[0][:31] + "\N{HORIZONTAL ELLIPSIS}"
    colours = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, "
        "getComputedStyle(document.querySelector('.ytick text')).fill]"
    )
    background, foreground = (sum(map(int, colour[4:-1].split(","))) for colour in colours)
    assert (background > foreground) == (scheme == "light")
    assert page.locator("img, b").count() == 0


def test_the_page_is_drawn_follows_the_theme_and_shows_texts_on_hover(browser: Any, address: str) -> None:
    with opened(browser, address, color_scheme="light", viewport={"width": 1200, "height": 900}) as page:
        assert_drawn(page, "light", 1200)
        page.emulate_media(color_scheme="dark")
        expect(page.locator("html")).to_have_attribute("data-drawn", "dark")
        assert_drawn(page, "dark", 1200)
        chart = page.locator("#chart-map-pca")
        chart.scroll_into_view_if_needed()
        for place, text in enumerate((HOSTILE[0], QUOTED)):
            chart.locator(".scatterlayer .point").nth(place).hover(force=True)
            expect(chart.locator(".hoverlayer")).to_contain_text(text)
        assert page.locator("img").count() == 0


def test_the_page_fits_a_small_screen_and_axe_finds_no_violations(browser: Any, address: str) -> None:
    pytest.importorskip("axe_playwright_python", reason="this test needs the package axe-playwright-python")
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    options = {"color_scheme": "light", "viewport": {"width": 360, "height": 800}, "bypass_csp": True}
    with opened(browser, address, **options) as page:
        assert_drawn(page, "light", 360)
        page.evaluate(axe)
        for scheme, rules in (("light", "{}"), ("dark", "{ runOnly: ['color-contrast'] }")):
            page.emulate_media(color_scheme=scheme)
            expect(page.locator("html")).to_have_attribute("data-drawn", scheme)
            page.evaluate(
                "document.querySelectorAll('.chart').forEach((chart) => chart.replaceChildren())"
            )  # of Plotly
            found = page.evaluate(f"axe.run(document, {rules})")["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], scheme
