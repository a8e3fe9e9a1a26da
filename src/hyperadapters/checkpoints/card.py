"""The model card: the README.md of a checkpoint, which the Hugging Face Hub displays."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import TypeAdapter

from hyperadapters._version import __version__
from hyperadapters.config import METRICS_FILE, Task
from hyperadapters.errors import OutputError
from hyperadapters.model.model import HyperAdapterModel
from hyperadapters.utils.files import write_atomically
from hyperadapters.utils.reading import parse_json

CARD_FILE = "README.md"
LISTED_TASKS, LISTED_LABELS, LABEL_LENGTH = 50, 8, 40
"""Maximum numbers of tasks, of labels of a task and of characters of a label in a card."""
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Scores by task, split and metric, as in `metrics.json`."""

_SCORES = TypeAdapter(dict[str, dict[str, dict[str, float]]])
_MARKER = "<!-- hyperadapters card {}: saving writes it anew until you change it; then it is yours and stays. -->"
_MARKED = re.compile(_MARKER.format("([0-9a-f]{12})"))
_SPECIAL = re.compile(r"[!-+/:-@\[-`{-~]|(?<=www)\.", re.IGNORECASE)
_PIPELINES = {
    "classification": "text-classification",
    "multi-label": "text-classification",
    "regression": "text-classification",
    "text-to-text": "text-generation",
}
_METRICS_OF_HUB = {
    "macro_f1": "f1",
    "micro_f1": "f1",
    "subset_accuracy": "accuracy",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
}
_MEASURES = ("calibration_error", "brier_score")
_NOT_OF_HUB = {"temperature", *_MEASURES, *(f"{name}_before" for name in _MEASURES)}
_SIZES = {"bottleneck": ("adapter_dim", "shared_adapter_dim"), "lora": ("lora_rank", "lora_alpha", "target_modules")}

logger = logging.getLogger(__name__)


def write_card(
    model: HyperAdapterModel, folder: Path, name: str, license: str | None = None, scores: Scores | None = None
) -> None:
    """Write the card of a checkpoint. A card that was written or edited by hand is kept.

    Args:
        model: Model of the checkpoint.
        folder: Folder of the checkpoint.
        name: Name by which `from_pretrained` finds the checkpoint: a folder, or a name on the Hub.
        license: License by its name on the Hub, for example "apache-2.0". Default: the license of the card that is
            replaced, if there is one.
        scores: Scores of the tasks. Default: the card contains no scores.

    Raises:
        OutputError: If the card cannot be written.
    """
    path = folder / CARD_FILE
    if path.is_file():
        if not is_generated(path):
            if license is not None:
                logger.warning(f"{path}: was edited by hand and is kept; write 'license: {license}' into it")
            return
        license = license or ModelCard(_read(path)).data.license
    data, body = _front_matter(model, name, license, scores or {}), _body(model, name, license, scores or {})
    front = f"---\n{data.to_yaml()}\n---\n\n"
    write_atomically(path, (front + _MARKER.format(_digest(front, body)) + body).encode())


def is_generated(path: Path) -> bool:
    """Return whether a card was written by this library and has not been edited since.

    Args:
        path: Path of the card.

    Raises:
        OutputError: If the card cannot be read.
    """
    parts = _MARKED.split(_read(path))
    return len(parts) == 3 and parts[1] == _digest(parts[0], parts[2])


def read_scores(folder: Path) -> Scores:
    """Return the scores in the `metrics.json` of a training run.

    Args:
        folder: Folder of the run.

    Returns:
        Scores by task, split and metric; empty if there is no such file, or the file has other contents.
    """
    try:
        return scores_in(parse_json((folder / METRICS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def scores_in(metrics: Mapping[str, Any]) -> Scores:
    """Return the scores in the contents of a `metrics.json`, and the measures of calibration with them.

    Args:
        metrics: Contents of the file.

    Returns:
        Scores by task, split and metric.

    Raises:
        ValueError: If the contents have another form.
    """
    if not isinstance(metrics, Mapping) or "tasks" not in metrics:
        raise ValueError("expected a mapping with scores of tasks")
    scores, measures = (_SCORES.validate_python(metrics.get(name, {})) for name in ("tasks", "calibration"))
    for name, splits in measures.items():
        for split, found in splits.items():
            scores.get(name, {}).get(split, {}).update(found)
    return scores


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be read to check whether it may be replaced: {error}") from error


def _digest(front: str, body: str) -> str:
    return hashlib.sha256((front + body).encode()).hexdigest()[:12]


def _front_matter(model: HyperAdapterModel, name: str, license: str | None, scores: Scores) -> ModelCardData:
    """Return the metadata that the Hub reads. The license may be missing."""
    pipelines = {_PIPELINES[task.kind] for task in model.tasks}
    base_model = model.backbone_name if _is_hub_name(model.backbone_name) else None
    return ModelCardData(
        license=license,
        library_name="hyperadapters",
        base_model=base_model,
        base_model_relation="adapter" if base_model else None,
        pipeline_tag=pipelines.pop() if len(pipelines) == 1 else None,
        tags=["hyperadapters", "adapters", "hypernetwork", "multi-task"],
        model_name=_title(name),
        eval_results=[
            EvalResult(
                task_type=_PIPELINES[task.kind],
                dataset_type=task.name,
                dataset_name=task.name,
                dataset_split=split,
                metric_type=_METRICS_OF_HUB.get(metric, metric),
                metric_name=metric,
                metric_value=round(value, 4),
            )
            for task in model.tasks[:LISTED_TASKS]
            for split, found in [_scores_of(task, scores)]
            for metric, value in found.items()
            if metric not in _NOT_OF_HUB
        ]
        or None,
    )


def _is_hub_name(backbone: str | None) -> bool:
    """Return whether a name can be that of a backbone on the Hub."""
    try:
        validate_repo_id(backbone)
    except HFValidationError:
        return False
    return backbone is not None and not Path(backbone).exists()


def _title(name: str) -> str:
    return Path(name).resolve().name


def _scores_of(task: Task, scores: Scores) -> tuple[str, dict[str, float]]:
    """Return split and scores of a task: those of the test rows if there are any, otherwise of the validation rows."""
    splits = scores.get(task.name, {})
    split = "test" if "test" in splits else "validation"
    return split, {metric: value for metric, value in splits.get(split, {}).items() if math.isfinite(value)}


def _body(model: HyperAdapterModel, name: str, license: str | None, scores: Scores) -> str:
    number = "one task" if len(model.tasks) == 1 else f"{len(model.tasks):,} tasks"
    return f"""

# {_escaped(_title(name))}

Adapters for {number} on one frozen language model, which is not included. They were trained with the Python library
hyperadapters, version {__version__}.

## Tasks

{_task_table(model, scores)}

## Backbone

{_backbone(model)}

## How to use

```python
{_usage(model, name)}
```

## Settings

{_settings(model)}

## Limits

- Texts longer than {model.lengths.input} tokens are truncated.
- {_routing(model)}
- The answers also reflect what the language model has learned from its own training data, including its biases.

## Licence

{license or "Not stated. The author can add `license:` to the metadata at the top of this file."}
"""


def _task_table(model: HyperAdapterModel, scores: Scores) -> str:
    tasks = model.tasks[:LISTED_TASKS]
    rows = [["task", "kind", "labels", "metric", "score", "calibration error", "Brier score"], ["---"] * 7]
    for task in tasks:
        split, found = _scores_of(task, scores)
        score = f"{found[task.main_metric]:.4f} ({split})" if task.main_metric in found else ""
        calibration = [_before_and_after(found, name) for name in _MEASURES]
        rows.append([_cell(task.name), task.kind, _labels(task), task.main_metric, score, *calibration])
    while not any(row[-1] for row in rows[2:]):
        rows = [row[:-1] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    if len(model.tasks) > len(tasks):
        lines += ["", f"And {len(model.tasks) - len(tasks):,} more: `hyperadapter.json` has all of them."]
    if len(rows[0]) >= 5:
        lines += [
            "",
            "Scores are those of the training run. Tasks that were fitted later have no score, or an outdated one.",
        ]
    if len(rows[0]) == 7:
        lines.append("Measures of calibration are those without and with the temperature of the task.")
    return "\n".join(lines)


def _before_and_after(scores: Mapping[str, float], name: str) -> str:
    before, after = scores.get(f"{name}_before"), scores.get(name)
    return "" if before is None or after is None else f"{before:.3f} → {after:.3f}"


def _labels(task: Task) -> str:
    described = task.descriptions or {}
    listed = task.labels[:LISTED_LABELS]
    shown = ", ".join(_cell(label) + (f" ({_cell(described[label])})" if described else "") for label in listed)
    return f"{shown}, … ({len(task.labels)} in all)" if len(task.labels) > LISTED_LABELS else shown


def _cell(text: str) -> str:
    """Return a text as a cell of a table: on one line, shortened and escaped."""
    line = " ".join(text.split())
    line = line if len(line) <= LABEL_LENGTH else line[: LABEL_LENGTH - 1] + "…"
    return _escaped(line)


def _escaped(text: str) -> str:
    """Return a text with all characters escaped that have a meaning in Markdown and its extensions."""
    return _SPECIAL.sub(r"\\\g<0>", text)


def _code(text: str) -> str:
    """Return a text as code, between more backticks than it contains."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _backbone(model: HyperAdapterModel) -> str:
    fingerprint = f"its weights have the fingerprint `{model.fingerprint.bfloat16[:12]}`; other weights are refused."
    if model.backbone_name is None:
        return f"A model passed in memory; {fingerprint} Pass it as `backbone=`."
    if _is_hub_name(model.backbone_name):
        return f"`{model.backbone_name}`; {fingerprint}"
    return f"{_code(Path(model.backbone_name).name)}, a local folder of the author; {fingerprint}"


def _usage(model: HyperAdapterModel, name: str) -> str:
    where, task = _quoted(name), model.tasks[0]
    if model.backbone_name is None:  # it may have no tokenizer either
        splits_pairs = model.adapter_config.separates_texts and any(task.is_pair for task in model.tasks)
        inputs = "input_ids, attention_mask" + (", sequence_ids=sequence_ids" if splits_pairs else "")
        return (
            "from hyperadapters import HyperAdapterModel\n\n"
            f"model = HyperAdapterModel.from_pretrained({where}, backbone=backbone)\n"
            f"output = model({inputs}, task_ids=task_ids)  # task_ids: rows of the table, from 0"
        )
    inputs = '[("A first text", "and a second")]' if task.is_pair else '["A text"]'
    lines = ["from hyperadapters import Predictor", "", f"predictor = Predictor.from_pretrained({where})"]
    heads = [f"for found in predictor({inputs}, task={_quoted(task.name)}):"]
    if model.method.can_route:
        heads.append(f"for found in predictor({inputs}):  # the task is found by routing")
    for head in heads:
        lines += [head, "    print(found.task, found.answer)"]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _settings(model: HyperAdapterModel) -> str:
    config = model.adapter_config
    names = ["method", "preset", "form", *_SIZES[config.form], "feature_layer", "prototype_dim", "hidden_dim"]
    values = {name: value for name in names if (value := getattr(config, name)) is not None}
    lines = [f"- {name}: {', '.join(value) if isinstance(value, tuple) else value}" for name, value in values.items()]
    return "\n".join([*lines, f"- trained parameters: {model.num_trainable_parameters():,}"])


def _routing(model: HyperAdapterModel) -> str:
    if model.method.can_route:
        return "An input without a task is routed to the most similar task, or is declined. Other tasks are not known."
    return f"Each input needs a task, because method `{model.adapter_config.method}` cannot route."
