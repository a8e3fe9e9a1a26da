"""Each way in which the folder of a finished run can be damaged; the backbone stands beside it in the folder `bert`."""

from __future__ import annotations

import json
from pathlib import Path

from helpers import save_backbone


def nothing_there(run: Path) -> None:
    for path in run.iterdir():
        path.unlink()


def folder_gone(run: Path) -> None:
    nothing_there(run)
    run.rmdir()


def weights_gone(run: Path) -> None:
    next(run.glob("*.safetensors")).unlink()


def weights_truncated(run: Path) -> None:
    path = next(run.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-10])


def weights_altered(run: Path) -> None:
    path = next(run.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def json_truncated(run: Path) -> None:
    path = run / "hyperadapter.json"
    path.write_text(path.read_text()[:-30])


def json_altered(run: Path) -> None:
    path = run / "hyperadapter.json"
    text = path.read_text()
    path.write_text(text.replace('"yes"', '"yep"'))
    assert path.read_text() != text


def json_unknown_key(run: Path) -> None:
    path = run / "hyperadapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modle": {}}))


def json_newer(run: Path) -> None:
    path = run / "hyperadapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 99, "future": True}))


def json_points_outside(run: Path) -> None:
    path = run / "hyperadapter.json"
    values = json.loads(path.read_text())
    values["weights"]["file"] = "../" + values["weights"]["file"]
    path.write_text(json.dumps(values))


def backbone_replaced(run: Path) -> None:
    save_backbone(run.parent / "bert", "bert", seed=1)


def backbone_gone(run: Path) -> None:
    (run.parent / "bert").rename(run.parent / "moved")
