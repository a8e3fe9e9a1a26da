"""README.md and docs/: every code block runs, or says why not.

The pages run in a folder with a tiny encoder in the place of all-MiniLM-L6-v2, which knows the words of all blocks, and
with a small run, data files and recipes that their commands name. The Python of README.md has the real encoder, because
it says what the trained model answers.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from code_blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, check_command, commands_of, run_bash, run_python
from command_line import Cli
from helpers import SPECIAL, save_backbone, tiny_backbone, tiny_tokenizer

from hyperadapters import load_recipe, quickstart, train
from hyperadapters.backbones import loading

BLOCKS = {page: blocks_of(page) for page in PAGES}
RUN = [page for page, blocks in BLOCKS.items() if any(block.runs for block in blocks)]
COMMANDS = [block for blocks in BLOCKS.values() for block in blocks if block.language == "bash"]
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
SPLITS = ("train", "validation", "test")
TEXTS = {
    "delivery": ["Where is my parcel?", "My order has not arrived", "The courier never came", "Has it been sent?"],
    "refund": ["I want my money back", "When is my payment returned?", "Please pay me back", "Return my money"],
}
ROWS = [(text, label) for label, texts in TEXTS.items() for text in texts]


def write_csv(path: Path, header: str, rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in [header, *map(",".join, rows)]), encoding="utf-8")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands of the documents name: backbones, a run, data files and recipes."""
    folder = tmp_path_factory.mktemp("workplace")
    words = sorted({word for blocks in BLOCKS.values() for block in blocks for word in re.findall(r"\w+", block.text)})
    vocabulary = [*SPECIAL, *words]
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 64, "max_position_embeddings": 128}
    tiny_backbone("bert", **sizes).save_pretrained(folder / ENCODER)
    tiny_tokenizer(vocabulary).save_pretrained(folder / ENCODER)
    save_backbone(folder / "google-t5" / "t5-base", "t5")
    answers = [(text, "yes" if label == "refund" else "no") for text, label in ROWS]
    films = [("A dull story", "bad"), ("A wonderful story", "good"), ("Two hours of fog", "bad"), ("I laughed", "good")]
    data = {"intent": ROWS, "refunds": answers, "film": films}
    for name, rows in data.items():
        write_csv(folder / "data" / f"{name}.csv", "text,label", rows * 5)
    sources = {name: {"path": dict.fromkeys(SPLITS, f"../data/{name}.csv")} for name in data}
    recipe = {
        "backbone": ENCODER,
        "training": {"max_steps": 2, "eval_steps": 2, "batch_size": 4},
        "tasks": [{"name": name, "source": source} for name, source in sources.items()],
    }
    (folder / "recipes").mkdir()
    (folder / "recipes" / "helpdesk.yaml").write_text(yaml.safe_dump(recipe))
    shutil.copy(ROOT / "recipes" / "demo.yaml", folder / "recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loading, "PACKAGED", {})
        train(load_recipe("recipes/helpdesk.yaml"), "runs/helpdesk")
    write_csv(folder / "texts.csv", "text", [(text,) for text, _ in ROWS])
    write_csv(folder / "labelled.csv", "text,task,label", [(text, "intent", label) for text, label in ROWS])
    write_csv(folder / "other.csv", "text", [(f"{text} A dull story",) for text, _ in ROWS * 2])
    write_csv(folder / "urgent.csv", "text,label", [(text, "yes" if "my" in text else "no") for text, _ in ROWS])
    return folder


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_names_a_language_in_which_its_content_is_written(page: Path) -> None:
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, block.place
        if block.language == "yaml":
            yaml.safe_load(block.text)


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block.place)
def test_commands_have_arguments_that_exist(block: Block) -> None:
    for words in commands_of(block):
        check_command(words)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # get_peft_model reads it
@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(
    page: Path, workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    folder = shutil.copytree(workplace, tmp_path / "work")
    monkeypatch.chdir(folder)
    monkeypatch.setattr(quickstart, "MIN_STEPS", 8)
    packaged = loading.PACKAGED
    variables: dict[str, Any] = {"__name__": page.stem}
    for block in filter(lambda block: block.runs, BLOCKS[page]):
        is_real = block.language == "python" and page.name == "README.md"
        monkeypatch.setattr(loading, "PACKAGED", packaged if is_real else {})  # the encoder that is installed, or none
        if block.language == "python":
            run_python(block, variables)
        else:
            run_bash(block, cli)
