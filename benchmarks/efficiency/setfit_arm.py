"""SetFit as itself: the whole backbone tuned on pairs of texts of one label or of two, then a logistic regression.

It sees as many examples as each task's share in the other arms, two in each pair, and has no early stopping: its last
state is the result. The texts of a pair are joined by the separator, since SetFit reads single texts. Regression tasks
are left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from importlib import import_module
from tempfile import TemporaryDirectory
from typing import Any

from efficiency.experiment import FLOAT32_BYTES, Cell, Outcome, Setting, Trained
from efficiency.training_loop import task_scores
from hyperadapters.backbones.loading import locate
from hyperadapters.config import Split
from hyperadapters.data.examples import Example, TaskData
from hyperadapters.errors import MissingPackageError

PAIRS_PER_STEP = 16


def train_setfit(setting: Setting, cell: Cell, rate: float) -> Trained:
    """Train SetFit on each classification task.

    Args:
        setting: backbone, budgets and device.
        cell: the tasks with their rows.
        rate: learning rate of the backbone.

    Raises:
        MissingPackageError: setfit is not installed.
    """
    shares = setting.budget(cell).steps_alone([len(data.splits["train"]) for data in cell.tasks])
    rows_per_step = setting.budget(cell).task_batch_size
    tasks = [data for data in cell.tasks if data.task.kind == "classification"]
    examples = {data.task.name: steps * rows_per_step for data, steps in zip(cell.tasks, shares, strict=True)}
    steps = [max(1, examples[data.task.name] // (2 * PAIRS_PER_STEP)) for data in tasks]
    started = time.monotonic()
    models = [_train(setting, data, count, rate, cell.seed) for data, count in zip(tasks, steps, strict=True)]
    seconds = time.monotonic() - started

    def scores(split: Split) -> dict[str, float]:
        found: dict[str, float] = {}
        for model, data in zip(models, tasks, strict=True):
            rows = data.splits[split]
            answers = model.predict(_texts(setting, rows), show_progress_bar=False).tolist()
            found.update(task_scores([other.task for other in cell.tasks], rows, answers))
        return found

    validation = scores("validation")
    trainable = sum(_numbers(model) for model in models)
    return Trained(
        validation=sum(validation.values()) / len(validation),
        test=lambda: Outcome(scores("test")),
        trainable=trainable,
        trainable_per_task=trainable / len(tasks),
        bytes_per_task=FLOAT32_BYTES * trainable / len(tasks),
        steps=sum(steps),
        seconds=seconds,
    )


def _train(setting: Setting, data: TaskData, steps: int, rate: float, seed: int) -> Any:
    setfit, datasets = _setfit(), import_module("datasets")
    transformer = import_module("sentence_transformers").SentenceTransformer(
        locate(setting.backbone_name), device=setting.device
    )
    transformer.max_seq_length = setting.max_length
    head = import_module("sklearn.linear_model").LogisticRegression(max_iter=2000)
    model = setfit.SetFitModel(model_body=transformer, model_head=head)
    rows = data.splits["train"]
    table = {"text": _texts(setting, rows), "label": [int(example.target or 0) for example in rows]}
    with TemporaryDirectory() as folder:
        arguments = setfit.TrainingArguments(
            output_dir=folder,
            batch_size=PAIRS_PER_STEP,
            max_steps=steps,
            body_learning_rate=rate,
            seed=seed,
            report_to="none",
            save_strategy="no",
            show_progress_bar=False,
        )
        setfit.Trainer(model=model, args=arguments, train_dataset=datasets.Dataset.from_dict(table)).train()
    return model


def _texts(setting: Setting, examples: Sequence[Example]) -> list[str]:
    separator = f" {setting.texts.separator} "
    return [separator.join(filter(None, (example.text, example.text_pair))) for example in examples]


def _numbers(model: Any) -> int:
    head = model.model_head
    return (
        sum(parameter.numel() for parameter in model.model_body.parameters()) + head.coef_.size + head.intercept_.size
    )


def _setfit() -> Any:
    try:
        return import_module("setfit")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "This arm needs the package 'setfit'. Install it with: pip install 'hyperadapters[bench]'"
        ) from error
