"""Write tiny models, their AdapterHub exports and their outputs, for check_adapterhub.py in another environment."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import PAIR_TASKS, add_new, lived_in, make_model, make_plus_model, stirred, tiny_backbone
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from hyperadapters.config import Task
from hyperadapters.interop.adapterhub import export_adapterhub
from hyperadapters.model.model import HyperAdapterModel

FIRST, END, PAD = 2, 1, 0


def tokens(*texts: list[int]) -> list[int]:
    return [FIRST, *(token for text in texts for token in [*text, END])]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = [torch.tensor(row) for row in rows]
    mask = [torch.ones_like(row) for row in ids]
    return tuple(torch.nn.utils.rnn.pad_sequence(part, batch_first=True) for part in (ids, mask))


def inputs_of(task: Task) -> dict[str, Tensor]:
    """Rows of a task, and each of their texts by itself."""
    generator = torch.Generator().manual_seed(3)
    firsts, seconds = (
        [torch.randint(3, 40, (length,), generator=generator).tolist() for length in lengths]
        for lengths in ((3, 6, 1, 4), (5, 2, 2, 7))
    )
    found = {"text_ids": padded([tokens(text) for text in firsts])}
    found["input_ids"] = found["text_ids"]
    if task.is_pair:
        found["text_pair_ids"] = padded([tokens(text) for text in seconds])
        found["input_ids"] = padded([tokens(*pair) for pair in zip(firsts, seconds, strict=True)])
    ids = {name: tensors[0] for name, tensors in found.items()}
    masks = {name.replace("ids", "mask"): tensors[1] for name, tensors in found.items()}
    return {name: tensor.clone() for name, tensor in {**ids, **masks}.items()}


@torch.no_grad()
def write(folder: Path, kind: str, model: HyperAdapterModel, name: str) -> None:
    task_id = model.task_id(name)
    tiny_backbone(kind).save_pretrained(folder / "backbone")
    export_adapterhub(model, name, folder / "export")
    found = inputs_of(model.tasks[task_id])
    batch = {"input_ids": found["input_ids"], "attention_mask": found["input_mask"]}
    task_ids = torch.full((len(batch["input_ids"]),), task_id)
    if model.text_to_text:
        found["decoder_input_ids"] = torch.randint(3, 40, (len(task_ids), 5))
        found["generated"] = model.generate(**batch, task_ids=task_ids, num_beams=3, max_new_tokens=8, do_sample=False)
        found["logits"] = model(**batch, task_ids=task_ids, decoder_input_ids=found["decoder_input_ids"]).logits
    else:
        sequence_ids = None
        if "text_pair_mask" in found:
            sequence_ids = torch.full_like(batch["input_ids"], -1)
            for row, first in enumerate(found["text_mask"].sum(dim=1).tolist()):
                sequence_ids[row, 1 : first - 1] = 0
                sequence_ids[row, first : int(batch["attention_mask"][row].sum()) - 1] = 1
        found["logits"] = model(**batch, task_ids=task_ids, sequence_ids=sequence_ids).logits
    save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / "expected.safetensors")


def main(folder: Path) -> None:
    logging.disable_progress_bar()
    for kind in ("t5", "flan-t5", "mt5"):
        settings = {"adapter_norm_input": False, "shared_adapter_dim": 5, "frozen_encoder_layers": int(kind == "t5")}
        write(folder / kind, kind, make_model(kind, **settings), "size")
    for kind in ("bert", "roberta", "xlm-roberta"):
        model = make_model(kind)
        model.rename_task("colour", "v1.type")
        write(folder / kind, kind, model, "v1.type")
    added = lived_in("bert", feature_layer=1)
    add_new(added)
    write(folder / "bert-own-adapter", "bert", added, "mood")
    write(folder / "bert-regression", "bert", added, "size")
    write(folder / "bert-added", "bert", added, "new")
    whole = lived_in("bert", features="backbone")
    add_new(whole)
    whole.rename_task("new", "type")
    write(folder / "bert-added-backbone", "bert", whole, "type")
    for head_inputs in ("pair_features", "text_features", "adapted_texts"):
        plus = stirred(make_plus_model(head_inputs=head_inputs))
        for task in PAIR_TASKS:
            write(folder / f"bert-plus-{head_inputs}-{task.name}", "bert", plus, task.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
