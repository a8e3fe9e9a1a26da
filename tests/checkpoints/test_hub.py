"""Checkpoints on the Hub: what is pushed is what is loaded, cards are safe, and each failure is one clear error."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    make_batch,
    make_frozen_texts_model,
    make_model,
    make_plus_model,
    save_backbone,
    tiny_backbone,
    tiny_tokenizer,
)
from hub_stub import HubStub, serve_hub
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt

from hyperadapters.checkpoints.card import CARD_FILE, is_generated
from hyperadapters.checkpoints.format import CONFIG_FILE, save_model
from hyperadapters.config import METRICS_FILE, ModelConfig, Task
from hyperadapters.errors import CheckpointError, OutputError
from hyperadapters.inference.predictor import Predictor
from hyperadapters.model.model import HyperAdapterModel

NAME = "user/helpdesk"
SCORES = {
    "colour": {"validation": {"accuracy": 0.5}, "test": {"accuracy": 0.9166666, "macro_f1": 0.75}},
    "size": {"validation": {"pearson": 0.25}},
    "mood": {"test": {"accuracy": float("nan")}},
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    with serve_hub() as stub:
        monkeypatch.setattr(constants, "ENDPOINT", stub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", stub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_URL_HOSTS", constants.HF_URL_HOSTS | {"127.0.0.1"})
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"), raising=False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield stub


def _card(folder: Path) -> str:
    return (folder / CARD_FILE).read_text(encoding="utf-8")


def _load(name: str | Path = NAME, **options: Any) -> HyperAdapterModel:
    return HyperAdapterModel.from_pretrained(name, backbone=tiny_backbone("bert"), **options)


def _moved(model: HyperAdapterModel) -> HyperAdapterModel:
    with torch.no_grad():
        model.method.prototypes.weight.add_(1.0)
    return model


# Push and fetch


def test_what_was_pushed_loads_by_name_with_the_same_outputs_bit_for_bit(hub: HubStub) -> None:
    model, batch = make_model("bert"), make_batch("bert")
    url = model.push_to_hub(NAME, token="hf_secret", private=True, license="mit", commit_message="First")
    assert url == f"{hub.url}/{NAME}/commit/{1:040x}"
    assert hub.private[NAME] == "private"
    assert "Bearer hf_secret" in hub.tokens
    _, commit = hub.repositories[NAME]
    assert commit.lines[0]["value"]["summary"] == "First"
    (weights,) = [name for name in commit.files if name.endswith(".safetensors")]
    assert commit.names("file") == {CARD_FILE, CONFIG_FILE, weights}
    card = commit.files[CARD_FILE].decode()
    assert f'from_pretrained("{NAME}"' in card
    assert ModelCard(card).data.license == "mit"
    loaded = _load()
    assert loaded.tasks == model.tasks
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert loaded.folder is None


def test_nothing_is_fetched_but_the_checkpoint(hub: HubStub, tmp_path: Path) -> None:
    make_model("bert").push_to_hub(NAME)
    hub.edit(NAME, "evil.py", b"")
    _load()
    fetched = {path.name for path in (tmp_path / "cache").glob("models--*/snapshots/*/*")}
    assert {Path(name).suffix for name in fetched} == {".json", ".safetensors"}
    assert len(fetched) == 2


def test_a_second_push_replaces_the_first_in_one_commit(hub: HubStub) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    hub.edit(NAME, "notes/adapters-1.safetensors", b"kept")
    _moved(model).push_to_hub(NAME)
    _, first, _, second = hub.repositories[NAME]
    (old,) = [name for name in first.files if name.endswith(".safetensors")]
    assert second.names("deletedFile") == {old}
    assert sorted(Path(name).suffix for name in second.files) == ["", ".json", ".md", ".safetensors", ".safetensors"]
    assert torch.equal(_load().method.prototypes.weight, model.method.prototypes.weight)
    earlier = _load(revision=first.oid)
    assert torch.equal(earlier.method.prototypes.weight + 1.0, model.method.prototypes.weight)


def test_pushing_the_same_model_again_deletes_nothing(hub: HubStub) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    model.push_to_hub(NAME)
    assert hub.repositories[NAME][-1].names("deletedFile") == set()
    assert torch.equal(_load().method.prototypes.weight, model.method.prototypes.weight)


def test_the_predictor_loads_by_name(hub: HubStub, tmp_path: Path) -> None:
    folder = save_backbone(tmp_path / "bert", "bert")
    model = HyperAdapterModel.from_backbone(str(folder), [Task.classification("mood", ["bad", "good"])], adapter_dim=4)
    model.push_to_hub(NAME)
    predictor = Predictor.from_pretrained(NAME, device="cpu", revision="main", token="hf_secret", batch_size=2)
    (found,) = predictor(["good w1"], task="mood")
    (expected,) = Predictor(model)(["good w1"], task="mood")
    assert found.probabilities == expected.probabilities


def test_a_folder_of_that_name_goes_before_the_hub(
    hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_model("bert")
    model.save_pretrained(NAME)
    hub.requests.clear()
    loaded = _load(NAME)
    assert torch.equal(loaded.method.prototypes.weight, model.method.prototypes.weight)
    assert loaded.folder == Path(NAME)
    assert not hub.requests


def test_a_tokenizer_is_pushed_replaced_and_fetched(hub: HubStub, tmp_path: Path) -> None:
    model = make_model("bert")
    model.tokenizer = tiny_tokenizer()
    for words in ([], ["neu"], None):
        if words is None:
            del model.tokenizer
        elif words:
            model.tokenizer.add_tokens(words)
        model.push_to_hub(NAME)
        files = {name for name in hub.repositories[NAME][-1].files if name.startswith("tokenizer-")}
        assert len({name.partition("/")[0] for name in files}) == (0 if words is None else 1)
        loaded = _load()
        assert loaded.has_tokenizer == (words is not None)
        if words is not None:
            assert len(loaded.tokenizer) == len(model.tokenizer)


def test_offline_reads_the_cache(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    _load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert torch.equal(_load().method.prototypes.weight, model.method.prototypes.weight)
    with pytest.raises(
        CheckpointError,
        match="user/other: no such folder, and on the Hub: HF_HUB_OFFLINE is set, and the repository",
    ):
        _load("user/other")
    with pytest.raises(OutputError, match="user/other: not uploaded to the Hub: HF_HUB_OFFLINE is set"):
        model.push_to_hub("user/other")
    assert not hub.requests


def test_without_network_the_cache_is_read(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    _load()
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        monkeypatch.setattr(constants, name, getattr(constants, name).replace(hub.url, "http://127.0.0.1:9"))
    assert torch.equal(_load().method.prototypes.weight, model.method.prototypes.weight)
    with pytest.raises(CheckpointError, match=r"user/other: no such folder, and on the Hub: .*Connect"):
        _load("user/other")
    with pytest.raises(OutputError, match=r"user/other: not uploaded to the Hub: .*"):
        model.push_to_hub("user/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("user/nothing", "and on the Hub: there is no repository of this name, or it is private: .*pass token="),
        ("user/gated", "and on the Hub: the owner gives access on request: request it on the page"),
        ("user/empty", r"and on the Hub no checkpoint: expected a file hyperadapter\.json"),
        ("no-such-name", "and on the Hub: this is no valid name of a repository"),
        ("runs/helpdesk/last", "and on the Hub: this is no valid name"),
        ("../helpdesk", "and on the Hub: this is no valid name"),
        ("/helpdesk", "and on the Hub: this is no valid name"),
        ("user/a--b", "and on the Hub: this is no valid name"),
    ],
)
def test_what_is_neither_a_folder_nor_on_the_hub_is_one_clear_error(hub: HubStub, name: str, message: str) -> None:
    hub.create("user/gated")
    hub.gated.add("user/gated")
    hub.create("user/empty")
    with pytest.raises(CheckpointError, match=f"^{re.escape(name)}: no such folder, {message}"):
        Predictor.from_pretrained(name)


def test_a_revision_that_is_not_there_is_named(hub: HubStub) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    with pytest.raises(CheckpointError, match="on the Hub: there is no such revision: check the name of the branch"):
        _load(revision="v2")
    with pytest.raises(OutputError, match="not uploaded to the Hub: there is no such revision"):
        model.push_to_hub(NAME, revision="v2")


def test_a_path_is_never_a_name_on_the_hub(hub: HubStub) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint here; expected a file hyperadapter\.json"):
        _load(Path(NAME))
    assert not hub.requests


def test_a_card_that_the_hub_refuses_is_an_error_with_its_words(hub: HubStub) -> None:
    hub.refuses_cards = True
    with pytest.raises(OutputError, match=r'not uploaded to the Hub: Invalid metadata .* "license" must be one of'):
        make_model("bert").push_to_hub(NAME, license="mine")
    assert len(hub.repositories[NAME]) == 1


def test_a_push_is_refused_when_somebody_else_pushed_meanwhile(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.create(NAME)

    def meanwhile(*arguments: Any) -> None:
        hub.edit(NAME, "other.txt", b"")
        save_model(*arguments)

    monkeypatch.setattr("hyperadapters.checkpoints.hub.save_model", meanwhile)
    with pytest.raises(OutputError, match=r"not uploaded to the Hub: .*412"):
        make_model("bert").push_to_hub(NAME)
    assert CONFIG_FILE not in hub.repositories[NAME][-1].files


# Whose card it is


def test_a_card_of_the_library_is_written_anew_and_keeps_its_license(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path, license="apache-2.0")
    model.rename_task("mood", "temper")
    model.save_pretrained(tmp_path)
    assert "| temper |" in _card(tmp_path)
    assert "| mood |" not in _card(tmp_path)
    assert ModelCard(_card(tmp_path)).data.license == "apache-2.0"
    assert is_generated(tmp_path / CARD_FILE)


@pytest.mark.parametrize("changed", ["anew", "front", "body", "bytes"])
def test_a_card_that_somebody_wrote_or_changed_stays(
    changed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    text = {
        "anew": b"# Mine\n",
        "front": _card(tmp_path).replace("---\n", "---\nlicense: mit\n", 1).encode(),
        "body": _card(tmp_path).replace("## Limits", "## Limits\n\n- Trained on few rows.").encode(),
        "bytes": b"\xff\xfe",
    }[changed]
    (tmp_path / CARD_FILE).write_bytes(text)
    with caplog.at_level(logging.WARNING, "hyperadapters"):
        _moved(model).save_pretrained(tmp_path)
    assert not caplog.records
    model.save_pretrained(tmp_path, license="mit")
    assert (tmp_path / CARD_FILE).read_bytes() == text
    assert "is kept; write 'license: mit' into it" in caplog.text
    assert torch.equal(_load(tmp_path).method.prototypes.weight, model.method.prototypes.weight)


def test_a_card_that_cannot_be_written_is_an_error_after_the_checkpoint_is_saved(tmp_path: Path) -> None:
    (tmp_path / CARD_FILE).mkdir()
    model = make_model("bert")
    with pytest.raises(OutputError, match=f"{CARD_FILE}: cannot be written: .*Is a directory"):
        model.save_pretrained(tmp_path)
    assert torch.equal(_load(tmp_path).method.prototypes.weight, model.method.prototypes.weight)


def test_a_card_that_was_changed_on_the_hub_stays(hub: HubStub) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME, license="mit")
    _moved(model).push_to_hub(NAME)
    card = hub.repositories[NAME][-1].files[CARD_FILE]
    assert ModelCard(card.decode()).data.license == "mit"
    hub.edit(NAME, CARD_FILE, card + b"More.\n")
    _moved(model).push_to_hub(NAME)
    assert hub.repositories[NAME][-1].files[CARD_FILE] == card + b"More.\n"


def test_a_card_that_was_changed_beside_the_checkpoint_is_pushed(hub: HubStub, tmp_path: Path) -> None:
    model = make_model("bert")
    model.push_to_hub(NAME)
    hub.edit(NAME, CARD_FILE, b"# On the Hub\n")
    model.save_pretrained(tmp_path)
    (tmp_path / CARD_FILE).write_text("# Mine\n")
    model.push_to_hub(NAME)
    assert hub.repositories[NAME][-1].files[CARD_FILE] == b"# Mine\n"


def test_scores_of_the_run_are_in_the_pushed_card(hub: HubStub, tmp_path: Path) -> None:
    make_model("bert").save_pretrained(tmp_path)
    (tmp_path / METRICS_FILE).write_text(json.dumps({"tasks": SCORES, "seconds": 1.0}))
    _load(tmp_path).push_to_hub(NAME)
    assert "0.9167 (test)" in hub.repositories[NAME][-1].files[CARD_FILE].decode()


def test_a_pull_request_is_asked_for(hub: HubStub) -> None:
    make_model("bert").push_to_hub(NAME, create_pr=True)
    asked = [request for request, query in zip(hub.requests, hub.queries, strict=True) if query == "create_pr=1"]
    assert asked[-1] == f"POST /api/models/{NAME}/commit/main"


# What a card says


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    model = HyperAdapterModel(tiny_backbone("bert"), make_model("bert").tasks, backbone_name="google-bert/bert-base")
    model.save_pretrained(tmp_path / "helpdesk", license="mit", scores=SCORES)
    data = ModelCard.load(tmp_path / "helpdesk" / CARD_FILE).data
    assert data.license == "mit"
    assert data.library_name == "hyperadapters"
    assert (data.base_model, data.base_model_relation) == ("google-bert/bert-base", "adapter")
    assert data.pipeline_tag == "text-classification"
    assert "hyperadapters" in data.tags
    assert data.model_name == "helpdesk"
    found = [(r.dataset_name, r.dataset_split, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results]
    assert found == [
        ("colour", "test", "accuracy", "accuracy", 0.9167),
        ("colour", "test", "f1", "macro_f1", 0.75),
        ("size", "validation", "pearsonr", "pearson", 0.25),
    ]


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    model = make_model("bert")
    model.save_pretrained(tmp_path)
    data = ModelCard(_card(tmp_path)).data
    assert (data.license, data.base_model, data.eval_results) == (None, None, None)
    assert "score" not in _card(tmp_path)
    assert "Not stated." in _card(tmp_path)
    assert "A model passed in memory" in _card(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"tasks": ["a"]}', '{"tasks": {"colour": {"test": 0.5}}}'])
def test_metrics_of_something_else_do_not_stand_in_the_way(text: str, tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_text(text)
    make_model("bert").save_pretrained(tmp_path)
    assert "score" not in _card(tmp_path)


def test_the_body_names_tasks_backbone_settings_and_parameters(tmp_path: Path) -> None:
    model = make_model("bert")
    (tmp_path / METRICS_FILE).write_text(json.dumps({"tasks": SCORES}))
    model.save_pretrained(tmp_path)
    card = _card(tmp_path)
    assert "| colour | classification | red, blue, green | accuracy | 0.9167 (test) |" in card
    assert "| size | regression |  | pearson | 0.2500 (validation) |" in card
    assert "| mood | classification | bad, good | accuracy |  |" in card
    assert model.fingerprint.bfloat16[:12] in card
    assert "- preset: paper\n- form: bottleneck\n- adapter_dim: 4\n" in card
    assert f"- trained parameters: {model.num_trainable_parameters():,}\n" in card


def test_a_lora_on_a_language_model_has_its_own_settings(tmp_path: Path) -> None:
    tasks = [Task.text_to_text("summary"), Task.classification("mood", ["bad", "good"])]
    model = HyperAdapterModel(tiny_backbone("llama"), tasks, ModelConfig(form="lora", lora_rank=2))
    model.save_pretrained(tmp_path)
    assert "- lora_rank: 2\n" in _card(tmp_path)
    assert "- target_modules: " in _card(tmp_path)
    assert "adapter_dim" not in _card(tmp_path)
    assert ModelCard(_card(tmp_path)).data.pipeline_tag is None  # it depends on the task


def test_many_tasks_and_labels_stay_readable(tmp_path: Path) -> None:
    labels = [f"label {index}" for index in range(150)]
    tasks = [Task.classification(f"task{index}", labels) for index in range(1200)]
    scores = {task.name: {"test": {"accuracy": 0.5}} for task in tasks}
    HyperAdapterModel(tiny_backbone("bert"), tasks).save_pretrained(tmp_path, scores=scores)
    card = _card(tmp_path)
    assert "Adapters for 1,200 tasks" in card
    assert "label 7, … (150 in all)" in card
    assert "And 1,150 more: `hyperadapter.json` has all of them." in card
    assert len(card) < 30_000
    assert len(ModelCard(card).data.eval_results) == 50


def test_names_of_any_kind_leave_the_table_and_the_front_matter_whole(tmp_path: Path) -> None:
    labels = ["a|b", "two\nlines", "<!-- c", "--- [d](e)", "`f` *g*", "h" * 60]
    tasks = [Task.classification('größe: "x" | y', labels), Task.classification("no", ["yes", "null"])]
    model = HyperAdapterModel(tiny_backbone("bert"), tasks)
    model.save_pretrained(tmp_path, scores={tasks[0].name: {"test": {"accuracy": 1.0}}})
    (row,) = [line for line in _card(tmp_path).splitlines() if line.startswith("| größe")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 6
    assert r"two lines, \<\!-- c, --- \[d\]\(e\), \`f\` \*g\*, hhh" in row
    assert ModelCard(_card(tmp_path)).data.eval_results[0].dataset_name == tasks[0].name
    assert is_generated(tmp_path / CARD_FILE)


NAMES = [
    "a_b_c", "_a_ __b__", "$x$ $$y$$", "~~a~~ ~b~", "a & b &amp; &#65;", "> a", "# a #1", "@user/repo", ":smile:",
    "http://a.b/c", "www.a.bc", "a@b.cd", "<http://a.b>", "<b>a</b>", "<!-- a -->", "[a](b) ![c](d)", "[^1] [a]: b",
    "|", r"\|", r"\\|", r"a\b", "\\", "`a`", "``", "`", "*a* **b**", "1. a", "- [ ] a", "+ a", "---", "=== a",
    "{{a}} {b}", "^a^ ==b== ++c++", "a  b", "größe 🎈", "'a' \"b\" (c) -- ...", "!", "%a%", "a;b/c?d",
]  # fmt: skip


def test_every_name_is_shown_as_it_is_in_the_table(tmp_path: Path) -> None:
    """With a parser of Markdown: a cell is text, and nothing but text, whatever the name."""
    task_names = [name if not {"/", "\\"} & set(name) else f"task {index}" for index, name in enumerate(NAMES)]
    tasks = [Task.classification(task, [name, f"x{name}"]) for task, name in zip(task_names, NAMES, strict=True)]
    tasks.append(Task.classification("all", NAMES))
    backbone: Any = tiny_backbone("bert")
    HyperAdapterModel(backbone, tasks, backbone_name=str(tmp_path / "a`b_c``d")).save_pretrained(tmp_path / "_a_ *b*")
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(_card(tmp_path / "_a_ *b*"))
    cells = [inline for start, inline in pairwise(tokens) if start.type == "td_open"]
    assert all(child.type == "text" for cell in cells for child in cell.children or ())
    found = ["".join(child.content for child in cell.children or ()) for cell in cells]
    rows = [found[start : start + 4] for start in range(0, len(found), 4)]
    names = [" ".join(name.split()) for name in NAMES]
    assert [row[0] for row in rows] == [*(" ".join(name.split()) for name in task_names), "all"]
    assert [row[2] for row in rows[:-1]] == [f"{name}, x{name}" for name in names]
    assert rows[-1][2] == f"{', '.join(names[:8])}, … ({len(names)} in all)"
    (title,) = [inline for start, inline in pairwise(tokens) if start.type == "heading_open" and start.tag == "h1"]
    assert [(child.type, child.content) for child in title.children or ()] == [("text", "_a_ *b*")]
    children = [child for token in tokens for child in token.children or ()]
    assert "a`b_c``d" in [child.content for child in children if child.type == "code_inline"]


def _snippet(folder: Path) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", _card(folder), flags=re.DOTALL)
    return str(code)


@pytest.mark.parametrize("kind", ["bert", "t5", "llama"])
@pytest.mark.parametrize("method", ["pha", "shared_adapter"])
def test_the_code_of_a_card_runs(kind: str, method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backbone = save_backbone(tmp_path / kind, kind)
    tasks = [
        Task.classification('the "same"?', ["yes", "no"], fields=["text", "text_pair"]),
        Task.classification("mood", ["bad", "good"]),
    ]
    options = {"method": method, "preset": "paper", "adapter_dim": 4}
    HyperAdapterModel.from_backbone(str(backbone), tasks, **options).save_pretrained(tmp_path / "run")
    exec(_snippet(tmp_path / "run"), {})
    assert len(capsys.readouterr().out.splitlines()) == (2 if method == "pha" else 1)
    assert f"`{kind}`, a local folder of the author" in _card(tmp_path / "run")


def test_the_code_of_a_card_runs_with_a_backbone_given_in_memory(tmp_path: Path) -> None:
    batch = make_batch("bert")
    make_model("bert").save_pretrained(tmp_path)
    names = {"backbone": tiny_backbone("bert"), **batch}
    exec(_snippet(tmp_path), names)
    assert torch.equal(names["output"].logits, make_model("bert")(**batch).logits)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("make", "is_needed"), [(make_plus_model, True), (make_frozen_texts_model, False)])
def test_the_usage_has_sequence_ids_where_each_text_of_a_pair_is_a_sequence(
    make: Any, is_needed: bool, tmp_path: Path
) -> None:
    make().save_pretrained(tmp_path)
    assert ("model(input_ids, attention_mask, task_ids" in _card(tmp_path)) is not is_needed
    assert ("model(input_ids, attention_mask, sequence_ids=sequence_ids, task_ids" in _card(tmp_path)) is is_needed
