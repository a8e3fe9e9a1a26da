"""The runtime without torch beside torch and other libraries: texts a second, time to the first answer, and score.

    python benchmarks/runtime.py [RUN] [--tasks support_intent subj] [--data FOLDER] [--only answers] [--output PATH]

RUN is a run of recipes/demo.yaml. `--tasks` are tasks of the demo with single texts, or tasks of the folder of data,
which are added to the model from `--rows` training rows. On the same training and test rows of each task:

    torch                 `Predictor`
    runtime, runtime int8 `hyperadapters.runtime` on exports of the same model
    encode + regression   `encode` of sentence-transformers and a logistic regression of scikit-learn
    SetFit                fine-tuning of a copy of the encoder for the task
    model2vec             static embeddings that are distilled from the encoder, and a logistic regression

All of them have the encoder all-MiniLM-L6-v2. They are timed in turn in the same run, with one thread and with two; a
figure is the median. The time to the first answer is that of a new process, from before the first import to the
answer, once all files have been read before.

The answers of the runtime are also compared with those of the predictor, for all test rows of the run's own tasks, with
given tasks and without (`--only answers` does this alone). Writes a row for each task, library and number of threads to
benchmarks/results/runtime.jsonl, with the load of the machine, which should be otherwise idle. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import joblib
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from speed_parts.result_rows import rounded
from speed_parts.timing import interleaved

from hyperadapters import HyperAdapterModel, Predictor, Task, __version__
from hyperadapters.backbones.loading import locate
from hyperadapters.data.sources import read_file
from hyperadapters.interop.runtime import export_runtime
from hyperadapters.runtime import Runtime
from hyperadapters.training.run import load_run, load_run_tasks
from hyperadapters.utils.files import write_atomically

RESULTS = Path(__file__).parent / "results" / "runtime.jsonl"
MINILM = "sentence-transformers/all-MiniLM-L6-v2"
DEMO_TASK = "support_intent"
DEMO_DATA = Path(__file__).parents[1] / "src" / "hyperadapters" / "demo_data"
THREADS = (1, 2)
TEST_ROWS = 300
TIMED_TEXTS = 256
FIRST_ANSWER_REPEATS = 3
SETFIT_STEPS = 100
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)

Answer = Callable[[list[str]], Sequence[Any]]

FIRST_ANSWERS = {
    "torch": """
from hyperadapters import Predictor
answer = next(Predictor.from_pretrained(FOLDER, device="cpu")([TEXT], task=TASK)).answer
""",
    "runtime": """
from hyperadapters.runtime import Runtime
answer = Runtime(FOLDER).predict([TEXT], task=TASK)[0].answer
""",
    "encode + regression": """
import joblib
from sentence_transformers import SentenceTransformer
answer = joblib.load(FOLDER + "/regression").predict(SentenceTransformer(ENCODER, device="cpu").encode([TEXT]))[0]
""",
    "SetFit": """
from setfit import SetFitModel
answer = SetFitModel.from_pretrained(FOLDER, device="cpu").predict([TEXT])[0]
""",
    "model2vec": """
import joblib
from model2vec import StaticModel
answer = joblib.load(FOLDER + "/regression").predict(StaticModel.from_pretrained(FOLDER).encode([TEXT]))[0]
""",
}
FIRST_ANSWERS["runtime int8"] = FIRST_ANSWERS["runtime"]


class Rows(NamedTuple):
    """The rows of a task."""

    task: str
    train_texts: list[str]
    train_labels: list[str]
    test_texts: list[str]
    test_labels: list[str]


class Library(NamedTuple):
    """A trained library: its folder, and its answers with a number of threads."""

    folder: Path
    answer: Callable[[int], Answer]


def read_rows(folder: Path, task: str, count: int | None) -> Rows:
    """Read all rows of a task, or as many training rows of every label as make about `count` in all."""
    train, test = (
        [(str(row.values["text"]), str(row.values["label"])) for row in read_file(folder / task / f"{split}.jsonl")]
        for split in ("train", "test")
    )
    if count is not None:
        labels = sorted({label for _, label in train})
        share = max(2, round(count / len(labels)))
        train = [row for label in labels for row in [row for row in train if row[1] == label][:share]]
    order = np.random.default_rng(0).permutation(len(test))[:TEST_ROWS]
    return Rows(task, *map(list, zip(*train, strict=True)), *map(list, zip(*(test[i] for i in order), strict=True)))


def regression(features: Any, labels: list[str]) -> Any:
    """Fit a logistic regression on standardised features, whose regularisation is chosen by cross-validation."""
    folds = min(5, *Counter(labels).values())
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return GridSearchCV(model, {"logisticregression__C": STRENGTHS}, cv=folds).fit(features, labels).best_estimator_


def ours(model: HyperAdapterModel, task: str, folder: Path) -> dict[str, Library]:
    """Save the model, and export it twice."""
    places = {name: folder / name.replace(" ", "-") for name in ("torch", "runtime", "runtime int8")}
    model.save_pretrained(places["torch"])
    export_runtime(model, places["runtime"])
    export_runtime(model, places["runtime int8"], quantize="int8")
    predictor = Predictor(model)

    def by_torch(threads: int) -> Answer:
        return lambda texts: [found.answer for found in predictor(texts, task=task)]

    def by_runtime(place: Path) -> Callable[[int], Answer]:
        def of_threads(threads: int) -> Answer:
            runtime = Runtime(place, threads)
            return lambda texts: [found.answer for found in runtime.predict(texts, task=task)]

        return of_threads

    found = {name: Library(place, by_runtime(place)) for name, place in places.items() if name != "torch"}
    return {"torch": Library(places["torch"], by_torch), **found}


def encode_and_regression(rows: Rows, folder: Path) -> Library:
    """Fit a regression to the embeddings of sentence-transformers."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(locate(MINILM), device="cpu")
    fitted = regression(encoder.encode(rows.train_texts), rows.train_labels)
    folder.mkdir(parents=True)
    joblib.dump(fitted, folder / "regression")
    return Library(folder, lambda threads: lambda texts: fitted.predict(encoder.encode(texts, batch_size=64)))


def setfit(rows: Rows, folder: Path) -> Library:
    """Fine-tune a copy of the encoder with SetFit's contrastive pairs, and fit its regression."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    model = SetFitModel.from_pretrained(locate(MINILM), device="cpu", labels=sorted({*rows.train_labels}))
    args = TrainingArguments(
        output_dir=str(folder.with_name("setfit-states")),
        batch_size=16,
        max_steps=SETFIT_STEPS,
        seed=0,
        report_to="none",
        save_strategy="no",
        show_progress_bar=False,
    )
    data = Dataset.from_dict({"text": rows.train_texts, "label": rows.train_labels})
    Trainer(model=model, args=args, train_dataset=data).train()
    model.save_pretrained(folder)
    return Library(folder, lambda threads: lambda texts: model.predict(texts, batch_size=64))


def distill(folder: Path) -> Path:
    """Distil static embeddings from the encoder, once for all tasks."""
    from model2vec.distill import distill as distill_encoder

    distill_encoder(locate(MINILM), device="cpu").save_pretrained(folder)
    return folder


def model2vec(rows: Rows, distilled: Path, folder: Path) -> Library:
    """Fit a regression to static embeddings."""
    from model2vec import StaticModel

    encoder = StaticModel.from_pretrained(distilled)
    fitted = regression(encoder.encode(rows.train_texts), rows.train_labels)
    encoder.save_pretrained(folder)
    joblib.dump(fitted, folder / "regression")
    return Library(folder, lambda threads: lambda texts: fitted.predict(encoder.encode(texts)))


def first_answer_seconds(library: str, folder: Path, rows: Rows) -> float:
    """Median time from the start of the first import to the first answer in a new process, which is warm."""
    values = {"FOLDER": str(folder), "TEXT": rows.test_texts[0], "TASK": rows.task, "ENCODER": locate(MINILM)}
    lines = ["import time", "started = time.perf_counter()", *(f"{key} = {value!r}" for key, value in values.items())]
    code = "\n".join([*lines, FIRST_ANSWERS[library], "print(time.perf_counter() - started)"])
    seconds = []
    for _ in range(FIRST_ANSWER_REPEATS + 1):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(float(done.stdout.splitlines()[-1]))
    return float(np.median(seconds[1:]))


def measure(rows: Rows, libraries: dict[str, Library], repeats: int) -> list[dict[str, Any]]:
    """Measure all libraries on the texts of a task."""
    texts = (rows.test_texts * (TIMED_TEXTS // len(rows.test_texts) + 1))[:TIMED_TEXTS]
    first = {name: first_answer_seconds(name, library.folder, rows) for name, library in libraries.items()}
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        answers = {name: library.answer(threads) for name, library in libraries.items()}
        times = interleaved({name: lambda f=f: f(texts) for name, f in answers.items()}, repeats)
        for name, answer in answers.items():
            right = np.mean([str(a) == b for a, b in zip(answer(rows.test_texts), rows.test_labels, strict=True)])
            slow, fast = sorted(TIMED_TEXTS * 1000 / ms for ms in times[name].quartiles_ms)
            found.append(
                {
                    "task": rows.task,
                    "library": name,
                    "threads": threads,
                    "texts_per_second": rounded(TIMED_TEXTS * 1000 / times[name].ms),
                    "quartiles": [rounded(slow), rounded(fast)],
                    "first_answer_s": rounded(first[name]),
                    "score": rounded(100 * float(right)),
                    "metric": "accuracy",
                    "megabytes": rounded(size_mb(libraries[name].folder)),
                    "train_rows": len(rows.train_texts),
                    "test_rows": len(rows.test_texts),
                    "repeats": repeats,
                    "load_average": rounded(os.getloadavg()[0]),
                    "version": __version__,
                    "versions": {package: version(package) for package in PACKAGES},
                }
            )
    return found


def compare_answers(run: Path) -> list[dict[str, Any]]:
    """Compare the answers of the runtime and the predictor for the test rows of a run's own tasks."""
    model, recipe = load_run(run)
    data = load_run_tasks(model, recipe)
    examples = [(found.task, example) for found in data for example in found.splits["test"]]
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        exports = {"runtime": None, "runtime int8": "int8"}
        for name, quantize in exports.items():
            export_runtime(model, Path(temporary) / name, quantize=quantize)
        for is_given in (True, False):
            inputs = [
                {"text": e.text, "text_pair": e.text_pair, **({"task": task.name} if is_given else {})}
                for task, e in examples
            ]
            expected = list(Predictor(model)(inputs))
            answers: dict[str, list[Any]] = {"torch": expected}
            answers |= {name: Runtime(Path(temporary) / name).predict(inputs) for name in exports}
            for name, predictions in answers.items():
                pairs = list(zip(predictions, expected, strict=True))
                right = [p.answer == t.labels[e.target] for p, (t, e) in zip(predictions, examples, strict=True)]
                found.append(
                    {
                        "task": f"all tasks of the run, {'given' if is_given else 'routed'}",
                        "library": name,
                        "threads": None,
                        "score": rounded(100 * float(np.mean(right))),
                        "metric": "accuracy",
                        "test_rows": len(examples),
                        "declined": sum(p.task is None for p in predictions),
                        "other_answers": sum((a.task, a.answer) != (b.task, b.answer) for a, b in pairs),
                        "largest_difference": rounded(max(map(_difference, *zip(*pairs, strict=True)))),
                        "version": __version__,
                    }
                )
    return found


def _difference(found: Any, expected: Any) -> float:
    """Largest difference of the probabilities of an input that both answered for the same task, or 0."""
    if found.task is None or found.task != expected.task:
        return 0.0
    return max(abs(found.probabilities[label] - value) for label, value in expected.probabilities.items())


def write_rows(path: Path, new: Sequence[dict[str, Any]]) -> None:
    """Put rows into a file of JSON-lines, in the place of those of the same task, library and number of threads."""
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    rows = {(row["task"], row["library"], row["threads"]): row for row in [*old, *new]}
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows.values()).encode())


PACKAGES = ("torch", "transformers", "onnxruntime", "tokenizers", "sentence-transformers", "setfit", "model2vec")


def size_mb(folder: Path) -> float:
    """Size of the files of a folder, in millions of bytes. That of torch and of `encode` lacks the encoder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="?", default=Path("runs/demo"))
    parser.add_argument("--data", type=Path, help="folder with TASK/train.jsonl and TASK/test.jsonl")
    parser.add_argument("--tasks", nargs="*", default=[DEMO_TASK])
    parser.add_argument("--rows", type=int, default=100, help="training rows of each task of the data")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["answers"])
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    write_rows(args.output, compare_answers(args.run))
    if args.only == "answers":
        return
    tasks = [
        read_rows(DEMO_DATA, name, None) if (DEMO_DATA / name).is_dir() else read_rows(args.data, name, args.rows)
        for name in args.tasks
    ]
    model = HyperAdapterModel.from_pretrained(args.run, dtype="float32").eval()
    for rows in tasks:
        if rows.task not in [task.name for task in model.tasks]:
            texts = zip(rows.train_texts, rows.train_labels, strict=True)
            examples = [{"text": text, "label": label} for text, label in texts]
            model.add_task(Task.classification(rows.task, sorted({*rows.train_labels})), examples)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        distilled = distill(folder / "distilled")
        for rows in tasks:
            torch.set_num_threads(THREADS[0])
            place = folder / rows.task
            libraries = {
                **ours(model, rows.task, place),
                "encode + regression": encode_and_regression(rows, place / "encode"),
                "SetFit": setfit(rows, place / "setfit"),
                "model2vec": model2vec(rows, distilled, place / "model2vec"),
            }
            found += measure(rows, libraries, args.repeats)
            write_rows(args.output, found)
    table = Table("task", "library", "threads", "texts a second", "first answer (s)", "accuracy", "MB")
    for row in found:
        names = ("threads", "texts_per_second", "first_answer_s", "score", "megabytes")
        table.add_row(row["task"], row["library"], *(f"{row[name]:g}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    main()
