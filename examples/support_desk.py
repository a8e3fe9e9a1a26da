"""A support desk: each message gets an intent and a spam flag, and a third question is added later from eight messages.

Texts that belong to no task are declined. The rows come with the package. Run it with
`python examples/support_desk.py`, which takes half a minute on two cores; with `--fast` it trains so little that the
answers mean nothing.
"""

import json
import sys
from importlib.resources import files

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments

ROWS, STEPS = (24, 2) if "--fast" in sys.argv else (120, 40)
"""Number of training rows of each task, and of training steps."""
CERTAIN = 0.7
"""Probability below which a message is left to a person."""
NEW_MESSAGES = [
    "The parcel was supposed to be here last Tuesday. Any news?",
    "You charged my card twice for the same order, and the rent is due today!",
    "WINNER!! reply YES to claim your free cruise",
]
INBOX = ["Where is my refund?", "WINNER!! reply YES to claim your free cruise", "Glaciers shrink faster than expected"]
URGENCY = {
    "yes": [
        "I need this fixed today, my flight leaves tonight",
        "Please call me back immediately, I am locked out",
        "The money must be there before noon",
        "This is an emergency, our shop is down",
    ],
    "no": [
        "No hurry, but where do I change my address?",
        "Whenever you have a minute, a question about the manual",
        "I was only wondering when you open",
        "Take your time, I just want to know the price",
    ],
}


def demo_rows(task: str, split: str = "train") -> list[dict[str, str]]:
    """Read rows of a task of the demo."""
    text = (files("hyperadapters") / "demo_data" / task / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][:ROWS]


train = {"intent": demo_rows("support_intent"), "spam": demo_rows("message_spam")}
tasks = [Task.classification(name, sorted({row["label"] for row in rows})) for name, rows in train.items()]
model = HyperAdapterModel.from_backbone("sentence-transformers/all-MiniLM-L6-v2", tasks)
Trainer(model, train, args=TrainingArguments(max_steps=STEPS, per_device_train_batch_size=16, logging_steps=20)).train()

# Fresh rows and texts of no task, here headlines, set the thresholds below which a text is declined. Both questions are
# asked about each message, so that routing only says whether a text is such a message at all.
fresh = {"intent": demo_rows("support_intent", "test"), "spam": demo_rows("message_spam", "test")}
model.calibrate(fresh, foreign=[row["text"] for row in demo_rows("headline_topic")], false_accept_rate=0.1)
for text, prediction in zip(INBOX, model.predict(INBOX), strict=True):
    print(f"{text} -> {'accepted' if prediction.task else 'declined'}")

# The new task has no training of its own: its head is fitted to the examples, and the other tasks do not change.
examples = [{"text": text, "label": label} for label, texts in URGENCY.items() for text in texts]
model.add_task(Task.classification("urgent", ["no", "yes"]), examples)

for message, answers in zip(NEW_MESSAGES, model.predict(NEW_MESSAGES, tasks=["intent", "spam", "urgent"]), strict=True):
    print(message)
    for answer in answers:
        probability = max(answer.probabilities.values())
        print(f"  {answer.task}: {answer.answer} ({probability:.2f})" + (", ask a person" * (probability < CERTAIN)))
