"""README.md: its first example is short, and its numbers are those of the result files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from code_blocks import blocks_of

from hyperadapters.backbones.architectures import ARCHITECTURES
from hyperadapters.demo import run as demo

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROSE = " ".join(README.split())
"""The README without its line breaks."""
RESULTS = ROOT / "benchmarks" / "results"


def test_the_first_example_comes_before_the_picture_and_has_ten_lines_without_its_data() -> None:
    first = next(block.text for block in blocks_of(ROOT / "README.md") if block.language == "python")
    assert README.index(first) < README.index("![")
    code = re.sub(r"^(\w+) = \{\n.*?^\}$", "", first, flags=re.DOTALL | re.MULTILINE)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_the_table_of_the_demo_has_the_numbers_of_its_result_file() -> None:
    comparison = json.loads((RESULTS / "demo" / "comparison.json").read_text())
    methods = ("majority", "linear_probe", "pha")
    rows = {name: [comparison["test"][method][name] for method in methods] for name in comparison["test"]["pha"]}
    rows["mean"] = [comparison["mean"][method] for method in methods]
    for name, scores in rows.items():
        cells = [name, *(f"{100 * score:.1f}" for score in scores)]
        assert re.search(r"│ +".join(re.escape(cell) + " +" for cell in cells), README), cells
    assert f"Routing: {100 * comparison['routing_accuracy']:.1f} % of test rows" in README
    assert f"Training took {comparison['seconds']:.0f} s." in README


def test_the_tables_of_the_demo_have_the_titles_that_it_prints() -> None:
    source = Path(demo.__file__).read_text(encoding="utf-8")
    titles = re.findall(r'Table\(title="([^"]+)"', source)
    assert len(titles) == 2
    for title in titles:
        assert re.search(rf"^ +{re.escape(title)}$", README, flags=re.MULTILINE), title


def test_the_mean_score_of_the_local_tasks_is_that_of_its_result_file() -> None:
    mean = json.loads((RESULTS / "local-glue-n100" / "metrics.json").read_text())["mean"]["test"]
    assert f"a mean test score of {mean:.3f}" in PROSE


def table_rows(name: str) -> list[list[str]]:
    """The rows of a table of docs/sample-efficiency.md, of which the first is the head."""
    document = (ROOT / "docs" / "sample-efficiency.md").read_text(encoding="utf-8")
    lines = document.partition(f"<!-- table: {name} -->")[2].partition("<!--")[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_comparison_has_the_rows_of_the_table_that_is_made_from_the_result_files() -> None:
    rows = [row for row in table_rows("suites") if row[0] == "n = 32" and "former heads" not in row[1]]
    found = README.partition("<!-- table: suites-32 -->")[2].partition("<!-- end -->")[0].strip().splitlines()[2:]
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in found] == rows != []


def differences_of_plus(size: str) -> dict[str, dict[str, str]]:
    """PHA+ minus each arm by suite, without the last bracket."""
    head, *rows = table_rows("plus-differences")
    return {
        row[1]: {suite: cell.replace("+", "").partition(";")[0] for suite, cell in zip(head, row, strict=True)}
        for row in rows
        if row[0] == size
    }


def test_the_numbers_of_the_text_are_those_of_the_tables() -> None:
    differences = differences_of_plus("n = 32")
    more_rows = differences_of_plus("n = 100")["adapter, shared, text heads"]
    assert f"with 100 rows a task, {more_rows['fdu']}) on the reviews, {more_rows['hwu64']}) on the intents" in PROSE
    assert f"nothing on the posts ({more_rows['tweeteval'].replace(' (', ', ')})" in PROSE
    shared = differences["adapter, shared, text heads"]
    assert f"{shared['hwu64']}) on the intents, {shared['tweeteval']}) on the posts, {shared['fdu']}) on the" in PROSE
    assert f"{shared['main']}) on the twelve tasks, and {shared['all']}) in one model of all 51 tasks" in PROSE
    alone = differences["PHA+ without hypernetwork"]
    assert f"`plus` scores {alone['fdu']}) more on the reviews" in PROSE
    intents, posts = (alone[suite].replace(" (", ", ", 1) for suite in ("hwu64", "tweeteval"))
    assert f"On the intents ({intents}) and the posts ({posts}) the two" in PROSE
    low_rank = differences["LoRA of rank 32, shared, text heads without token dropout"]["fdu"]
    assert low_rank == "-0.7 (-1.3 to -0.1"
    assert "A shared LoRA of rank 32 scores 0.7 (0.1 to 1.3) more than `plus` on the reviews" in PROSE
    copied = differences["adapter, shared, then per task, text heads"]
    assert f"{copied['all']}) more in the model of all 51 tasks and {copied['fdu']}) more on the reviews" in PROSE
    intents, posts = (copied[suite].replace(" (", ", ", 1) for suite in ("hwu64", "tweeteval"))
    assert f"from it on the intents ({intents}) and the posts ({posts})" in PROSE
    former = differences["PHA+ without token dropout and phases"]
    low, high = former["fdu"].partition(" (")[2].replace("-", "").split(" to ")
    assert f"scored {former['hwu64']}) less on the intents" in PROSE
    assert f"{former['fdu'].partition(' (')[0].replace('-', '')} ({high} to {low}) more on the reviews" in PROSE
    assert float(former["all"].partition(" (")[2].partition(" to ")[0]) < 0 < float(former["all"].split(" to ")[1])
    without = differences["PHA+ without adapters"]
    reviews, intents, main = (without[suite].partition(" (") for suite in ("fdu", "hwu64", "main"))
    assert f"{reviews[0]} (95 % interval {reviews[2]}) to its heads without adapters on the reviews" in PROSE
    assert f"{intents[0]} ({intents[2]}) on the intents" in PROSE
    assert f"it adds nothing ({main[0]}, {main[2]})" in PROSE
    head, *rows = table_rows("scores-main")
    scores = {row[0]: row[head.index("n = 100")].removesuffix(" (3)") for row in rows}
    assert f"of the twelve tasks: {scores['PHA']}, against {scores['LoRA, per task']} of LoRA for each task" in PROSE
    assert f"{scores['adapter, shared']} of one shared adapter, and {scores['linear probe']} of a linear probe" in PROSE


def test_the_numbers_of_related_tasks_with_plain_heads_are_those_of_the_tables() -> None:
    def scores(suite: str) -> list[str]:
        head, *rows = table_rows(f"scores-{suite}")
        found = {row[0]: row[head.index("n = 32")].removesuffix(" (3)") for row in rows}
        return [found[arm] for arm in ("PHA", "adapter, per task", "adapter, shared", "HyperFormer++ style")]

    published, alone, shared, hyperformer = scores("fdu")
    assert f"({published} against {alone}), as are one shared adapter ({shared})" in PROSE
    assert f"and HyperFormer ({hyperformer}). On the intents" in PROSE
    published, alone, shared, _ = scores("hwu64")
    assert f"({published} against {alone} and {shared})" in PROSE


def test_the_numbers_about_new_tasks_are_those_of_the_table() -> None:
    head, *rows = table_rows("suite-transfer-differences")
    frozen, lora, shared = (
        head.index(f"minus {what}")
        for what in (
            "logistic regression on text features",
            "LoRA, text heads",
            "logistic regression with the shared adapter of the other tasks",
        )
    )
    found = {(row[0], row[1]): row for row in rows if row[2].startswith("PHA+")}

    def differences(suite: str, column: int) -> list[str]:
        return [found[suite, k][column].partition(" (")[0].removeprefix("+") for k in ("4", "16", "32")]

    reviews, intents, posts = (differences(suite, frozen) for suite in ("fdu", "hwu64", "tweeteval"))
    assert f"{reviews[0]}, {reviews[1]} and {reviews[2]} points on the reviews" in PROSE
    assert f"{intents[0]}, {intents[1]} and {intents[2]} on the intents" in PROSE
    assert f"{posts[0]}, {posts[1]} and {posts[2]} on the posts" in PROSE
    few, more, most = (found["**mean**", k][shared].replace("+", "").partition(";")[0] for k in ("4", "16", "32"))
    assert f"`plus` is {few.replace(' (', ' points (')}) better with four examples" in PROSE
    assert f"cannot be told apart ({more.replace(' (', ', ')}, and {most.replace(' (', ', ')})" in PROSE
    mean = differences("**mean**", lora)
    assert f"{mean[0]}, {mean[1]} and {mean[2]} points above a LoRA for the new task with the same heads" in PROSE


def test_the_numbers_about_the_task_that_fails_are_those_of_the_table() -> None:
    head, *rows = table_rows("transfer")
    few, more = (
        [row[head.index(method)].partition(" ")[0] for method in ("`head`", "the same on text features")]
        for row in rows
        if row[0] in ("4", "16") and row[1] == "cb"
    )
    assert f"scores {few[0]} % with four examples of each label ({few[1]} % for the regression)" in PROSE
    assert f"and {more[0]} % with 16 ({more[1]} %)" in PROSE


def test_the_number_of_supported_model_types_is_right() -> None:
    assert f"\n{len(ARCHITECTURES)} model types of transformers are supported" in README
