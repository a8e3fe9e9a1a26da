"""Matching pairs: a new question is compared with the questions of a FAQ, and gets the answer of the best match.

The training rows are pairs of questions that ask the same or not, and come with the package. Run it with
`python examples/matching_pairs.py`; with `--fast` it trains so little that the answers mean nothing.
"""

import json
import sys
from importlib.resources import files

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments

ROWS, STEPS = (18, 2) if "--fast" in sys.argv else (None, 30)
"""Number of rows (None for all of them), and of training steps."""
FAQ = {
    "How do I remove rust from a pan?": "Scrub it with coarse salt and half a potato.",
    "How long does an opened jar of pesto keep?": "About a week in the fridge.",
    "What is the best way to clean suede shoes?": "Brush them dry, then use a little vinegar.",
    "How can I stop my door from squeaking?": "Put a drop of oil on each hinge.",
}
QUESTIONS = [
    "My skillet has gone rusty. What takes it off?",
    "What helps against a creaking hinge?",
    "Who won the cup in 1998?",
]
CERTAIN = 0.5
"""Probability below which no question of the FAQ counts as the same."""


def demo_rows(split: str) -> list[dict[str, str]]:
    """Read the pairs of the demo."""
    text = (files("hyperadapters") / "demo_data" / "same_question" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()][:ROWS]


same = Task.classification("same", ["different", "same"], fields=("text", "text_pair"))
model = HyperAdapterModel.from_backbone("sentence-transformers/all-MiniLM-L6-v2", [same])
arguments = TrainingArguments(max_steps=STEPS, logging_steps=15)
trainer = Trainer(model, {"same": demo_rows("train")}, args=arguments)
trainer.train()
scores = trainer.predict({"same": demo_rows("validation")}).metrics
print(f"accuracy on other pairs: {scores['test_same_accuracy']:.2f}")

known = list(FAQ)
pairs = [(question, other) for question in QUESTIONS for other in known]
probabilities = model.predict_proba(pairs, task="same")[:, 1].reshape(len(QUESTIONS), len(known))  # of "same"
for question, row in zip(QUESTIONS, probabilities, strict=True):
    best = int(row.argmax())
    found = FAQ[known[best]] if row[best] >= CERTAIN else "no such question, ask a person"
    print(f"{question} -> {found} ({row[best]:.2f})")
