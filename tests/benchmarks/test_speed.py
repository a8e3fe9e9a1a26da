"""The benchmark of speed: its options, its rows and their tables, on tiny models and invented texts."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import speed
import torch
from efficiency.data import Suite, entries_of
from helpers import save_backbone
from speed_parts import models, real_texts, serving
from speed_parts.models import Setting, make_batch, make_model, preset_of
from speed_parts.result_rows import row, write_rows
from speed_parts.runner import select
from tables import MISSING, SPEED_COLUMNS, speed_tables

from hyperadapters.backbones.loading import load_backbone
from hyperadapters.config import TaskEntry

TINY = Setting(encoder="tiny", rows=4, tokens=(6,), repeats=2, texts=8)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    """A setting whose encoder is a tiny one with a tokenizer."""
    folder = save_backbone(tmp_path / "tiny", max_position_embeddings=128)
    monkeypatch.setitem(models.BACKBONES, "tiny", lambda: load_backbone(str(folder)))
    return TINY


@pytest.mark.parametrize(("arguments", "expected"), [([], None), (["--preset", "paper"], "paper")])
def test_the_preset_is_an_option(arguments: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: list[Setting] = []
    monkeypatch.setattr(speed, "run", lambda parts, setting, *_: settings.append(setting))
    monkeypatch.setattr(sys, "argv", ["speed.py", "--quick", *arguments])
    speed.main()
    assert [found.preset for found in settings] == [expected]


def test_unknown_presets_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["speed.py", "--preset", "best"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "invalid choice: 'best'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "backbone", "expected"),
    [(None, "minilm", "plus"), (None, "t5-small", "paper"), ("paper", "minilm", "paper")],
)
def test_rows_have_the_preset_of_their_backbone(preset: str | None, backbone: str, expected: str) -> None:
    setting = Setting(preset=preset)
    assert preset_of(setting, backbone) == expected
    assert row(setting, "figure", 1.0, "higher", backbone=backbone)["preset"] == expected


def test_models_have_the_preset_of_the_setting() -> None:
    default, paper = (make_model(Setting(preset=preset), "bert-tiny", 2) for preset in (None, "paper"))
    assert (default.adapter_config.preset, paper.adapter_config.preset) == ("plus", "paper")
    assert default.pha.routes_by_densities
    assert not paper.pha.routes_by_densities
    assert make_model(Setting(), "t5-tiny", 2).adapter_config.preset == "paper"


def test_rows_replace_those_of_the_same_figure_device_and_preset(tmp_path: Path) -> None:
    path = tmp_path / "speed.jsonl"
    old = [row(Setting(preset=preset), "figure", 1.0, "higher") for preset in (None, "paper")]
    write_rows(path, old)
    write_rows(path, [row(Setting(), "figure", 2.0, "higher")])
    found = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(row["preset"], row["value"]) for row in found] == [("plus", 2.0), ("paper", 1.0)]


@pytest.mark.parametrize("preset", [None, "paper"])
def test_rows_of_a_batch_are_spread_over_the_first_tasks(preset: str | None) -> None:
    setting = Setting(preset=preset)
    model, batch = make_model(setting, "bert-tiny", 6), make_batch(setting, 8, 6)
    serving.route_to_first(model, batch, 2)
    with torch.inference_mode():
        assert set(model(**batch).task_ids.tolist()) == {0, 1}


def write_data(folder: Path) -> Path:
    """Write invented files of the suites that the figures of texts read; returns their folder."""
    described = [
        {"suite": "fdu", "name": name, "labels": ["bad", "good"], "metric": ["accuracy"]} for name in ("books", "music")
    ]
    (folder / "families").mkdir(parents=True)
    (folder / "families" / "tasks.json").write_text(json.dumps({"tasks": described}))
    suites: tuple[Suite, ...] = ("fdu", "main")
    for entry in (entry for suite in suites for entry in entries_of(folder, suite)):
        for split in ("train", "validation", "test"):
            path = Path(str(entry.source.path).format(split=split))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(invented(entry, index)) + "\n" for index in range(8)))
    return folder


def invented(entry: TaskEntry, index: int) -> dict[str, Any]:
    words = ["red", "blue", "green", "good"][: 1 + index % 4]
    label = index / 2 if entry.kind == "regression" else (entry.labels or ("bad", "good"))[index % 2]
    return {**dict.fromkeys(entry.fields, " ".join(words)), "label": label}


@pytest.mark.parametrize(("preset", "has_joint"), [(None, True), ("paper", False)])
def test_passes_over_texts(tiny: Setting, tmp_path: Path, preset: str | None, has_joint: bool) -> None:
    setting = replace(tiny, preset=preset, data=write_data(tmp_path / "data"))
    rows = {row["figure"]: row for row in real_texts.passes(setting)}
    assert ("forward_pairs_vs_bare_joint" in rows) == has_joint
    assert {"forward_texts_vs_bare", "forward_pairs_vs_bare"} <= rows.keys()
    assert all(found["preset"] == (preset or "plus") and found["value"] > 0 for found in rows.values())
    assert rows["forward_texts_vs_bare"]["tasks"] == 2
    assert len(rows["forward_texts_vs_bare"]["tokens"]) == setting.texts / setting.rows


def test_predictor_beside_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers")
    setting = Setting(rows=4, repeats=2, texts=8, data=write_data(tmp_path / "data"))
    rows = list(real_texts.predictor(setting))
    assert [found["figure"] for found in rows] == [
        f"predictor_vs_sentence_transformers_{end}" for end in ("told", "routed")
    ]
    assert all((found["texts"], found["max_length"]) == (8, 48) for found in rows)
    assert rows[0]["other_ms"] == rows[1]["other_ms"]  # of the same run


def test_figures_of_texts_are_left_out_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(data=tmp_path / "none")
    for part, names in ((real_texts.passes, "forward_texts_vs_bare"), (real_texts.predictor, "predictor_vs_")):
        assert list(part(setting)) == []
        assert f"not measured, because there is no folder {tmp_path / 'none'}" in (error := capsys.readouterr().err)
        assert names in error


def figures_of(preset: str, **fields: Any) -> dict[str, Any]:
    return {
        "figure": "mixed_batch_1_task",
        "preset": preset,
        "value": 0.9,
        "aim": 0.8,
        "better": "higher",
        "device": "cpu",
        "quartiles": [0.85, 0.95],
        "ours_ms": 10.0,
        "other_ms": 9.0,
        "other": "bare backbone",
        "backbone": "minilm",
        **fields,
    }


def cells(table: str, figure: str) -> list[str]:
    line = next(line for line in table.splitlines() if f"`{figure}`" in line)
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_paper_beside_the_default_preset() -> None:
    both = speed_tables([figures_of("paper", value=0.7, ours_ms=12.0), figures_of("plus")])
    assert f"| {' | '.join(SPEED_COLUMNS)} |" in both
    assert cells(both, "mixed_batch_1_task")[1:] == [
        "0.9 (0.85 to 0.95)",
        "0.7 (0.85 to 0.95)",
        "≥ 0.8",
        "10",
        "9",
        "bare backbone",
    ]


def test_tables_say_which_preset_was_not_measured() -> None:
    paper = speed_tables([figures_of("paper")])
    assert cells(paper, "mixed_batch_1_task")[1:3] == [MISSING, "0.9 (0.85 to 0.95)"]
    of_t5 = speed_tables([figures_of("paper", figure="generate_vs_bare", backbone="t5-small")])
    assert cells(of_t5, "generate_vs_bare")[1:3] == ["0.9 (0.85 to 0.95)"] * 2
    plus = speed_tables([figures_of("plus")])
    assert cells(plus, "mixed_batch_1_task")[1:3] == ["0.9 (0.85 to 0.95)", MISSING]


def test_new_figures_can_be_selected() -> None:
    for name in ("forward_pairs_vs_bare_joint", "predictor_vs_sentence_transformers_told"):
        (part,) = select(speed.PARTS, [name])
        assert part.measure in (real_texts.passes, real_texts.predictor)
