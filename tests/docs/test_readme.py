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


def test_the_comparison_has_the_numbers_of_the_table_that_is_made_from_the_result_files() -> None:
    document = (ROOT / "docs" / "sample-efficiency.md").read_text(encoding="utf-8")
    table = document.partition("<!-- table: scores-main -->")[2].partition("<!--")[0].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    scores = {row[0]: row[head.index("n = 100")].removesuffix(" (3)") for row in rows}
    arms = ("linear probe", "LoRA, per task", "adapter, shared", "PHA", "former PHA+")
    assert "| " + " | ".join(scores[arm] for arm in arms) + " |" in README
    assert f"scored the same without any adapters, {scores['former PHA+ without adapters']}" in PROSE


def test_the_number_of_supported_model_types_is_right() -> None:
    assert f"\n{len(ARCHITECTURES)} model types of transformers are supported" in README
