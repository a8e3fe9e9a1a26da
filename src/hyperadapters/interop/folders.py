"""What the exports have in common: the task, as it is described beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hyperadapters._version import __version__
from hyperadapters.model import HyperAdapterModel

DESCRIPTION_FILE = "hyperadapter_task.json"


def describe(model: HyperAdapterModel, task_id: int) -> dict[str, Any]:
    """What `DESCRIPTION_FILE` holds: the task with its labels and metrics, and what its inputs are made for."""
    return {
        "hyperadapters": __version__,
        "task": model.tasks[task_id].model_dump(),
        "lengths": model.lengths.model_dump(),
        "backbone": model.backbone_name,
        "backbone_fingerprint": model.backbone_fingerprint,
    }


def write_json(path: Path, contents: dict[str, Any]) -> None:
    """Write a JSON file for people to read as well."""
    path.write_text(json.dumps(contents, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
