"""One classifier for each customer: every one has labels of its own, and all of them are answered in one batch.

A model is trained once on a few public tasks. A customer then costs a few examples, no training, and some kilobytes in
a task store, from which only the customers of a batch are read. Run it with `python examples/customer_classifiers.py`;
with `--fast` it trains so little that the answers mean nothing.
"""

import json
import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.checkpoints.task_store import TaskStore
from hyperadapters.inference.stored_tasks import StorePredictor

ROWS, STEPS = (18, 2) if "--fast" in sys.argv else (60, 20)
"""Number of training rows of each public task, and of training steps."""
CUSTOMERS = {
    "bakery": {
        "order": ["Two loaves of rye for Friday, please", "Can I book a wedding cake?", "Twelve rolls for tomorrow"],
        "complaint": ["The bread was stale", "My cake arrived crushed", "The rolls were burnt on one side"],
    },
    "garage": {
        "appointment": ["When can you look at my brakes?", "I need new tyres next week", "Is Monday free for a check?"],
        "invoice": ["The bill lists oil twice", "Please send me the receipt", "Why does the repair cost so much?"],
    },
    "library": {
        "renewal": ["Please extend my loans", "I need two more weeks for the novel", "Can I keep the atlas longer?"],
        "lost": ["I cannot find the book any more", "The dog ate the dictionary", "I left the comic on the train"],
    },
}
NEW_TEXTS = [
    {"task": "bakery", "text": "The baguette was hard as stone"},
    {"task": "garage", "text": "Could you change the clutch on Thursday?"},
    {"task": "library", "text": "I dropped the guide in the river"},
    {"task": "bakery", "text": "Three apple pies for Sunday"},
]


def demo_rows(task: str) -> list[dict[str, str]]:
    """Read training rows of a task of the demo."""
    text = (files("hyperadapters") / "demo_data" / task / "train.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][:ROWS]


public = {name: demo_rows(name) for name in ("question_type", "headline_topic")}
tasks = [Task.classification(name, sorted({row["label"] for row in rows})) for name, rows in public.items()]
model = HyperAdapterModel.from_backbone("sentence-transformers/all-MiniLM-L6-v2", tasks)
Trainer(
    model, public, args=TrainingArguments(max_steps=STEPS, per_device_train_batch_size=16, logging_steps=10)
).train()

with tempfile.TemporaryDirectory() as folder:
    store = TaskStore.create(Path(folder) / "customers", model)
    for customer, labels in CUSTOMERS.items():
        rows = [{"text": text, "label": label} for label, texts in labels.items() for text in texts]
        model.add_task(Task.classification(customer, list(labels)), rows)
        store.append(model, [customer])
        model.remove_task(customer)  # the model stays small, however many customers there are
    size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    print(f"{len(store)} customers, {size / len(store) / 1024:.0f} KiB each; tasks in the model: {len(model.tasks)}")

    for row, prediction in zip(NEW_TEXTS, StorePredictor(model, store)(NEW_TEXTS), strict=True):
        print(f"{row['task']}: {prediction.answer} <- {row['text']}")

    store.remove(["garage"])
    print("left:", ", ".join(task.name for task in store))
