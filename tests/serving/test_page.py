"""The page of a server in a real browser: what people see, type and hear of it, and what must never happen."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from helpers import SIZES, save_backbone

import hyperadapters
from hyperadapters import HyperAdapterModel, Task

playwright_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need the package playwright")
pytest.importorskip("uvicorn", reason="the server needs the extra 'serve'")
expect = playwright_api.expect

HOSTILE = "<img src=x onerror=alert(1)>"
TASKS = [
    Task.classification("mood", ["bad", "good"]),
    Task.classification("colour", ["red", "blue", "w1", "w2", "w3"]),
    Task.classification("same", ["no", "yes"], fields=("text", "text_pair")),
]
CSV = 'text,label\n"good, w1",yes\ngood w2,yes\nbad w3,no\n"bad ""w4""",no\n'
ADMIN, READER = "an-admin-token-of-a-test", "a-reader-token-of-a-test"


# Server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of three tasks that was never trained: it declines only what has no words."""
    path: Path = tmp_path_factory.mktemp("page")
    backbone = save_backbone(path / "bert")
    model = HyperAdapterModel.from_backbone(str(backbone), TASKS, preset="paper", **SIZES)
    model.save_pretrained(path / "run")
    return path / "run"


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    log = folder.parent / f"{folder.name}.log"
    source = str(Path(hyperadapters.__file__).parents[1])
    command = [sys.executable, "-m", "hyperadapters.cli", "serve", str(folder), "--port", "0", *options]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
        )
    try:
        deadline = time.monotonic() + 180
        while (found := re.search(r"^Serving .* at (http://\S+)$", log.read_text(), re.MULTILINE)) is None:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with serving(folder) as address:
        yield address


def call(address: str, method: str, path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = Request(address + path, data, {"Content-Type": "application/json"}, method=method)
    with urlopen(request, timeout=120) as response:
        return json.load(response)


# Browser


@contextmanager
def opened(browser: Any, address: str, faults: str = "", **options: Any) -> Iterator[Any]:
    """The page in a fresh window, in which nothing may happen that must never happen.

    Args:
        browser: The browser.
        address: Address of the server.
        faults: Pattern of messages in the console that the test provokes.
        options: Options of the window.
    """
    context = browser.new_context(**options)
    context.set_default_timeout(30_000)
    page, found = context.new_page(), []

    def refuse(dialog: Any) -> None:
        found.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def note(message: Any) -> None:
        if message.type in ("error", "warning") and not (faults and re.search(faults, message.text)):
            found.append(f"console: {message.text}")

    def check(request: Any) -> None:
        if not request.url.startswith((f"{address}/", "data:,")):
            found.append(f"request: {request.url}")

    page.on("dialog", refuse)
    page.on("console", note)
    page.on("pageerror", lambda error: found.append(f"error: {error}"))
    page.on("request", check)
    context.add_init_script(
        "addEventListener('securitypolicyviolation', (event) => console.error('CSP', event.violatedDirective))"
    )
    page.goto(f"{address}/")
    yield page
    context.close()
    assert found == []


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[Any]:
    with opened(browser, server) as found:
        expect(found.locator("#tasks tr")).not_to_have_count(0)
        yield found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    path = Path(os.environ.get("HYPERADAPTERS_SCREENSHOTS", tmp_path))
    path.mkdir(parents=True, exist_ok=True)
    return path


def type_texts(page: Any, *texts: str) -> None:
    page.fill("#texts", "\n".join(texts))
    expect(page.locator("#results tbody")).to_have_count(len(texts))
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def cells(page: Any, place: str) -> list[str]:
    return [text.replace("\u2212", "-") for text in page.locator(place).all_inner_texts()]


def fill_form(page: Any, name: str, examples: str = CSV) -> None:
    page.fill("#name", name)
    page.fill("#examples", examples)


def add_task(page: Any, name: str, examples: str = CSV) -> None:
    fill_form(page, name, examples)
    page.click("#add")
    expect(page.locator("#added")).to_contain_text(f"The task {name} was added", timeout=120_000)


def remove_task(page: Any, name: str) -> None:
    page.get_by_role("button", name=f"Remove {name}", exact=True).click()
    page.click("#remove-yes")
    expect(page.locator("#tasks-status")).to_have_text(f"The task {name} was removed.", timeout=120_000)


# Answers


def test_texts_are_answered_while_they_are_typed(page: Any) -> None:
    page.locator("#texts").press_sequentially("good w1\nblue w2")
    expect(page.locator("#results tbody")).to_have_count(2)
    expect(page.locator("#status")).to_have_text("2 texts: 2 answers, 0 declined.")
    for row in page.locator("#results tbody tr").all():
        number, text, task, answer, confidence, version = row.locator("td, th").all_inner_texts()
        assert (number.strip(), text) in {("1", "good w1"), ("2", "blue w2")}
        name, similarity = task.split("\n")
        assert name.strip() in {"mood", "colour", "same"}
        assert re.fullmatch(r"similarity \u2212?\d+\.\d\d", similarity)
        assert answer in {label for one in TASKS for label in one.labels}
        assert re.fullmatch(r"\d+\.\d%", confidence)
        assert version == "0"


def test_a_text_without_words_is_declined_and_the_nearest_task_is_named(page: Any) -> None:
    type_texts(page, "????")
    expect(page.locator("#results tbody")).to_contain_text(
        re.compile(r"Declined\. Nearest task: (mood|colour|same), similarity \u2212?\d\.\d\d\. The text has no words\.")
    )
    expect(page.locator("#status")).to_have_text("1 text: 0 answers, 1 declined.")


def test_one_task_or_all_tasks_answer_where_they_are_chosen(page: Any) -> None:
    type_texts(page, "good w1", "????")
    page.select_option("#task", label="colour")
    expect(page.locator("#status")).to_have_text("2 texts: 2 answers, 0 declined.")
    assert [task.split()[0] for task in cells(page, "#results td[data-label=Task]")] == ["colour", "colour"]
    page.select_option("#task", label="All tasks")
    expect(page.locator("#results tbody:first-of-type tr")).not_to_have_count(1)
    tasks = [task.split()[0] for task in cells(page, "#results tbody:first-of-type td[data-label=Task]")]
    assert tasks[:2] == ["mood", "colour"]


@pytest.mark.parametrize("line", ["good w1 ||| good w2", "good w1\tgood w2"])
def test_a_line_with_a_separator_is_a_pair(page: Any, line: str) -> None:
    page.select_option("#task", label="same")
    type_texts(page, line)
    expect(page.locator("#results tbody th")).to_have_text("good w1 ||| good w2")
    expect(page.locator("#results td[data-label=Answer]")).to_have_text(re.compile("no|yes"))


def test_what_the_server_refuses_is_said_in_words(browser: Any, server: str) -> None:
    with opened(browser, server, faults="status of 422") as page:
        page.select_option("#task", label="mood")
        page.fill("#texts", "good ||| bad")
        expect(page.locator("#ask-error")).to_contain_text("found a text_pair, which task 'mood' does not read")
        expect(page.locator("#results")).to_be_hidden()
        page.fill("#texts", "good")
        expect(page.locator("#results tbody")).to_have_count(1)
        expect(page.locator("#ask-error")).to_be_hidden()


def test_a_server_that_cannot_be_reached_is_said_in_words(browser: Any, server: str) -> None:
    with opened(browser, server, faults="ERR_INTERNET_DISCONNECTED") as page:
        expect(page.locator("#tasks tr")).not_to_have_count(0)
        page.context.set_offline(True)
        page.fill("#texts", "good")
        expect(page.locator("#ask-error")).to_contain_text("The server cannot be reached.")


def test_an_answer_that_comes_late_does_not_replace_a_newer_one(page: Any) -> None:
    held: list[Any] = []

    def hold_first(route: Any) -> None:
        if held:
            route.continue_()
        else:
            held.append(route)

    page.route("**/v1/predict", hold_first)
    with page.expect_event("requestfailed") as failed:
        page.fill("#texts", "good w1")
        page.wait_for_timeout(600)
        assert len(held) == 1
        type_texts(page, "bad w2", "bad w3")
    assert "ABORTED" in failed.value.failure
    held[0].continue_()
    page.wait_for_timeout(600)
    expect(page.locator("#results tbody th").first).to_have_text("bad w2")
    page.unroute("**/v1/predict")


# Map and bars


def test_a_text_lands_on_the_map_where_the_server_puts_it(page: Any, server: str) -> None:
    type_texts(page, "blue w7 w8")
    with page.expect_response("**/v1/predict"):
        page.click("#ask")  # what is still being typed is not recorded
    found = call(server, "GET", "/v1/map")
    page.click("#positions summary")
    text, closest, cosine, right, up = cells(page, "#positions tbody tr > *")
    assert text == "1: blue w7 w8"
    assert [float(right), float(up)] == pytest.approx([found["inputs"][-1][axis] for axis in "xy"], abs=0.0051)
    bars = cells(page, "#bars tbody tr")
    assert bars[0].split() == [closest.strip(), cosine]
    assert page.locator("#map .typed circle").count() == 1
    expect(page.locator("#map")).to_have_attribute("aria-label", re.compile(r"^Map of 3 prototypes, .* and 1 text$"))


def test_prototypes_differ_by_shape_and_have_names(page: Any) -> None:
    type_texts(page, "w1")
    shapes = page.locator("#map .mark").evaluate_all("marks => marks.map((mark) => mark.getAttribute('d'))")
    assert len(set(shapes)) == len(shapes) == 3
    names = page.locator("#map > text").all_text_contents()
    assert sorted(names) == ["colour", "mood", "same"]


def test_bars_show_the_cosine_of_the_chosen_text_to_each_prototype_in_order(page: Any) -> None:
    type_texts(page, "good w1", "blue w2")
    expect(page.locator("#bars-text")).to_have_text("1: good w1")
    first = cells(page, "#bars tbody .number")
    page.locator("#results input[type=radio]").first.press("ArrowDown")
    expect(page.locator("#bars-text")).to_have_text("2: blue w2")
    second = cells(page, "#bars tbody .number")
    assert len(first) == len(second) == 3
    assert first != second
    assert all(float(a) >= float(b) for a, b in (*pairwise(first), *pairwise(second)))
    expect(page.locator("#map .selected text")).to_have_text("2")


# Tasks


def test_all_tasks_are_listed(page: Any) -> None:
    rows = [" ".join(row.split()) for row in cells(page, "#tasks tr")]
    assert re.fullmatch(r"mood classification bad, good 0 none unknown unknown \d+ Remove", rows[0])
    assert rows[1].startswith("colour classification 5: red, blue, w1, w2, w3")
    page.click("#tasks summary")
    assert cells(page, "#tasks li") == ["red", "blue", "w1", "w2", "w3"]


def test_a_task_is_added_tried_and_removed(page: Any) -> None:
    fill_form(page, "urgent")
    expect(page.locator("#preview")).to_have_text("4 examples, 2 labels: yes (2), no (2).")
    page.click("#add")
    expect(page.locator("#stage")).to_contain_text(re.compile(r"Waiting|Running: \w+"))
    expect(page.locator("#seconds")).to_have_text(re.compile(r"\d+\.\d s"))
    expect(page.locator("#added")).to_have_text(
        re.compile(r"^The task urgent was added from 4 examples in \d+\.\d s, and is chosen above\."), timeout=120_000
    )
    expect(page.locator("#progress")).to_be_hidden()
    expect(page.locator("#texts")).to_be_focused()
    expect(page.locator("#status")).to_have_text("Type a text to try the task urgent.")
    assert page.locator("#task").input_value() == "task:urgent"
    row = page.locator("#tasks tr").nth(3)
    assert row.locator("td, th").all_inner_texts()[0].strip() == "urgent"
    assert row.locator("td, th").all_inner_texts()[6] == "4"
    assert page.locator("#map .mark").count() == 4

    page.keyboard.type("good w9")
    expect(page.locator("#results td[data-label=Answer]")).to_have_text(re.compile("yes|no"))
    expect(page.locator("#results td[data-label='Version of the task']")).not_to_have_text("0")

    page.get_by_role("button", name="Remove urgent").click()
    expect(page.locator("#remove-text")).to_contain_text("The task urgent is removed.")
    expect(page.locator("#remove-no")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Remove urgent")).to_be_focused()
    remove_task(page, "urgent")
    expect(page.locator("#tasks tr")).to_have_count(3)
    expect(page.locator("#tasks-heading")).to_be_focused()
    assert page.locator("#task").input_value() == "find"
    assert page.locator("#map .mark").count() == 3


def test_a_task_that_waits_can_be_cancelled(page: Any, server: str) -> None:
    examples = [{"text": f"w{row % 40} " * 50, "label": "yn"[row % 2]} for row in range(4000)]
    before = call(server, "POST", "/v1/tasks", {"name": "long", "examples": examples})
    fill_form(page, "cancelled")
    page.click("#add")
    page.click("#cancel")
    expect(page.locator("#added")).to_have_text("Cancelled: the task cancelled was not added.")
    expect(page.locator("#progress")).to_be_hidden()
    assert call(server, "DELETE", f"/v1/jobs/{before['id']}")["state"] == "cancelled"
    assert page.locator("#name").input_value() == "cancelled"


def test_what_is_missing_in_the_form_is_said_and_gets_the_focus(page: Any) -> None:
    page.click("#add")
    expect(page.locator("#add-error")).to_have_text("Give the task a name.")
    expect(page.locator("#name")).to_be_focused()
    page.fill("#name", "empty")
    page.keyboard.press("Enter")
    expect(page.locator("#add-error")).to_have_text("Paste examples of the task.")
    expect(page.locator("#examples")).to_be_focused()
    page.fill("#examples", "good w1,yes\nbad w2")
    expect(page.locator("#preview")).to_have_text("Line 2: expected 2 columns, found 1.")
    page.click("#add")
    expect(page.locator("#add-error")).to_have_text("Line 2: expected 2 columns, found 1.")


def test_what_the_server_refuses_to_add_is_said_in_words(browser: Any, server: str) -> None:
    with opened(browser, server, faults="status of 4(09|22)") as page:
        for name, message in (("mood", "task 'mood' exists"), ("a/b", "must not contain path separators")):
            fill_form(page, name)
            page.click("#add")
            expect(page.locator("#add-error")).to_contain_text(message)


READ = "async ([source, kind]) => (await import('/page/examples.js')).readExamples(source, kind).examples"


@pytest.mark.parametrize(
    ("source", "kind", "expected"),
    [
        ("", "classification", []),
        ("a,x\nb,y", "classification", [("a", "x"), ("b", "y")]),
        ("\ufefflabel,text\r\nx,a\r\ny,b\r\n", "classification", [("a", "x"), ("b", "y")]),
        ("Text,Label,Source\na,x,1\n\nb,y,2", "classification", [("a", "x"), ("b", "y")]),
        ('"a, ""b""\nc",x\nd,y', "classification", [('a, "b"\nc', "x"), ("d", "y")]),
        ('x\ta, b\ny\tthe 5" screen', "classification", [("a, b", "x"), ('the 5" screen', "y")]),
        ("a,b,x\nc,,y", "classification", [("a", "x", "b"), ("c", "y")]),
        ("a,1.5\nb,-2e1", "regression", [("a", 1.5), ("b", -20)]),
        ("a,x; y\nb,\nc,y", "multi-label", [("a", ["x", "y"]), ("b", []), ("c", ["y"])]),
        ("a,b\nc,b", "text-to-text", [("a", "b"), ("c", "b")]),
    ],
)
def test_examples_are_read_from_csv_and_from_lines(page: Any, source: str, kind: str, expected: list[Any]) -> None:
    names = ("text", "label", "text_pair")
    assert page.evaluate(READ, [source, kind]) == [dict(zip(names, row, strict=False)) for row in expected]


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("a", "classification", "Line 1: expected 2 or 3 columns, found 1."),
        ("a,x\nb,c,y", "classification", "Line 2: expected 2 columns, found 3. A text with a comma has to be in quot"),
        ('a,x\n"b\n\nc,y', "classification", "Line 2: a quotation mark is opened and never closed."),
        ('a,x\n"b"c,y', "classification", "Line 2: expected a comma after a closing quotation mark."),
        ("a,x\n\n,y", "classification", "Line 3: the text is empty."),
        ("a,x\nb,", "classification", "Line 2: the label is empty."),
        ("a,x\nb,x", "classification", "Expected two labels or more, found one."),
        ("a,1\nb,one", "regression", "Line 2: expected a number, found one."),
        ("a,x\n" * 10_001, "text-to-text", "Expected at most 10000 examples, found 10001."),
    ],
)
def test_examples_with_faults_are_refused(page: Any, source: str, kind: str, message: str) -> None:
    with pytest.raises(playwright_api.Error, match=re.escape(message)):
        page.evaluate(READ, [source, kind])


# Safety


def test_markup_in_texts_names_and_labels_is_shown_as_text(page: Any) -> None:
    examples = f"{HOSTILE}yes\tgood w1\n{HOSTILE}yes\tgood w2\n{HOSTILE}no\tbad w3\n{HOSTILE}no\tbad w4"
    type_texts(page, HOSTILE, f"{HOSTILE} ||| {HOSTILE}")
    expect(page.locator("#results tbody th").first).to_have_text(HOSTILE)
    expect(page.locator("#bars-text")).to_have_text(f"1: {HOSTILE}")
    fill_form(page, HOSTILE, examples)
    expect(page.locator("#preview")).to_have_text(f"4 examples, 2 labels: {HOSTILE}yes (2), {HOSTILE}no (2).")
    page.fill("#texts", "")
    add_task(page, HOSTILE, examples)
    type_texts(page, "good w1")
    expect(page.locator("#results td[data-label=Answer]")).to_have_text(re.compile(f"^{re.escape(HOSTILE)}(yes|no)$"))
    expect(page.locator("#results td[data-label=Task]")).to_contain_text(HOSTILE)
    assert any(HOSTILE in row for row in cells(page, "#tasks tr"))
    assert any(HOSTILE in row for row in cells(page, "#bars tbody tr"))
    assert page.locator("img").count() == 0
    remove_task(page, HOSTILE)


def test_a_token_is_asked_for_and_forgotten_with_the_tab(
    browser: Any, folder: Path, tmp_path: Path, pictures: Path
) -> None:
    run = shutil.copytree(folder, tmp_path / "guarded")
    (tmp_path / "tokens").write_text(f"admin {ADMIN}\npredict {READER}\n")
    with (
        serving(run, "--token-file", str(tmp_path / "tokens")) as address,
        opened(browser, address, faults="status of 40[13]") as page,
    ):
        expect(page.locator("#token-message")).to_have_text("This server asks for a token. Enter it here.")
        page.screenshot(path=pictures / "token.png")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#token-message")).to_have_text("The server does not accept this token.")
        page.fill("#token", READER)
        page.keyboard.press("Enter")
        expect(page.locator("#tasks tr")).to_have_count(3)
        expect(page.locator("#token-section")).to_be_hidden()
        expect(page.locator("#texts")).to_be_focused()
        page.get_by_role("button", name="Remove mood").click()
        page.click("#remove-yes")
        expect(page.locator("#tasks-error")).to_contain_text("does not have the right 'admin'")
        page.fill("#token", ADMIN)
        page.click("#token-form button")
        expect(page.locator("#token-section")).to_be_hidden()
        remove_task(page, "mood")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        assert page.locator("#token").input_value() == ""


# Access for all


def test_the_page_works_by_keyboard_alone(page: Any) -> None:
    def focus() -> str:
        return str(page.evaluate("document.activeElement.id || document.activeElement.className"))

    def tab_to(target: str, limit: int = 12) -> None:
        for _ in range(limit):
            page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
            if focus() == target:
                return
        pytest.fail(f"{target} is not reached")

    page.keyboard.press("Tab")
    assert focus() == "skip"
    page.keyboard.press("Enter")
    expect(page.locator("#texts")).to_be_focused()
    page.keyboard.type("good w1")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#results tbody")).to_have_count(1)
    page.keyboard.press("Enter")
    page.keyboard.type("bad w2")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#results tbody")).to_have_count(2)
    for target in ("task", "ask", "results"):
        tab_to(target)
    page.keyboard.press("Tab")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#bars-text")).to_have_text("2: bad w2")
    tab_to("name")
    page.keyboard.type("by_hand")
    tab_to("kind")
    tab_to("examples")
    page.keyboard.insert_text("yes\tgood w1\nyes\tgood w2\nno\tbad w3\nno\tbad w4")
    tab_to("add")
    page.keyboard.press("Enter")
    expect(page.locator("#added")).to_contain_text("The task by_hand was added", timeout=120_000)
    expect(page.locator("#texts")).to_be_focused()
    page.get_by_role("button", name="Remove by_hand").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#remove-no")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#tasks-status")).to_have_text("The task by_hand was removed.", timeout=120_000)


def test_changes_are_announced(page: Any) -> None:
    for place in ("#status", "#preview", "#stage", "#added", "#tasks-status"):
        expect(page.locator(place)).to_have_attribute("role", "status")
    for place in ("#ask-error", "#add-error", "#tasks-error", "#token-message"):
        expect(page.locator(place)).to_have_attribute("role", "alert")
    expect(page.locator("#seconds")).not_to_have_attribute("role", "status")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_fits_its_window(browser: Any, server: str, pictures: Path, scheme: str, width: int) -> None:
    with opened(browser, server, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#tasks tr")).not_to_have_count(0)
        type_texts(page, "good w1", "????", "w" * 300, "good ||| bad")
        page.select_option("#task", label="All tasks")
        expect(page.locator("#results tbody:first-of-type tr")).not_to_have_count(1)
        page.click("#positions summary")
        fill_form(page, "n" * 200, f"{'l' * 100}\tgood\nother\tbad")
        expect(page.locator("#preview")).to_contain_text("2 examples")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        page.screenshot(path=pictures / f"page-{scheme}-{width}.png", full_page=True)
        shades = [
            [int(shade) for shade in re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))]
            for name in ("color", "backgroundColor")
        ]
        assert (sum(shades[0]) < sum(shades[1])) == (scheme == "light")


def test_nothing_moves_for_those_who_ask_for_that(browser: Any, server: str) -> None:
    with opened(browser, server, reduced_motion="reduce") as page:
        moving = (
            "[...document.querySelectorAll('*')].filter((one) => getComputedStyle(one).transitionDuration !== '0s')"
        )
        assert page.evaluate(f"{moving}.length") == 0


@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_violations(browser: Any, server: str, scheme: str, width: int) -> None:
    pytest.importorskip("axe_playwright_python", reason="this test needs the package axe-playwright-python")
    axe = (files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
    with opened(browser, server, color_scheme=scheme, viewport={"width": width, "height": 800}) as page:
        expect(page.locator("#tasks tr")).not_to_have_count(0)
        type_texts(page, "good w1", "????")
        page.click("#positions summary")
        fill_form(page, "mood", "a")
        expect(page.locator("#preview")).to_contain_text("Line 1")
        page.evaluate(axe)
        for place in ("the page", "the dialog"):
            found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
            assert [(one["id"], [node["html"] for node in one["nodes"]]) for one in found] == [], place
            page.evaluate(
                "document.querySelector('#remove-dialog').open || document.querySelector('#tasks button').click()"
            )
