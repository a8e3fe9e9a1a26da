"""What `hyperadapters check` finds in the benchmark data, and in copies of them that are damaged on purpose.

    python benchmarks/check_quality.py [--data FOLDER] [--output PATH] [--only PART ...] [--tables]

Writes benchmarks/results/check.jsonl, a row for each measurement, from which docs/data-quality.md has its figures:

- "all": all tasks checked together, with the number of rows of each finding, the time and the peak memory.
- "flipped": 5 % of the training labels of a task are replaced by random others. Which of them are suspected, with the
  features of MiniLM and with TF-IDF of character n-grams.
- "copied": 100 test rows are copied into the training rows, each changed in one way. Which of them are found.
- "contradictory": 100 training rows are repeated with another label. Which of them are found.
- "foreign": sentences in other languages among English texts of a task. Which of them, and which others, are found;
  and all rows that are found in the data as they are.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer

from hyperadapters.config import DEFAULT_BACKBONE, TaskEntry
from hyperadapters.data.task_files import find_tasks, infer_schemas, make_entry
from hyperadapters.quality.check import CheckSettings, check_tasks
from hyperadapters.quality.features import TextEncoder
from hyperadapters.quality.findings import CheckedRow, Finding
from hyperadapters.quality.label_errors import check_label_errors
from hyperadapters.quality.languages import LanguageIdentifier, check_languages
from hyperadapters.quality.leakage import check_duplicates
from hyperadapters.quality.rows import CheckedTask, read_tasks

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "check.jsonl"
FAMILIES = ("fdu", "hwu64", "tweeteval")
FLIPPED = (
    *("banking77", "subj", "sst2", "cola", "snli", "sick", "mrpc", "qnli", "boolq"),
    *("families/fdu/books", "families/hwu64/music", "families/tweeteval/emotion", "families/tweeteval/offensive"),
)
COPIED = ("banking77", "sst2", "subj", "snli", "mrpc", "families/fdu/books")
SEEDS = (0, 1, 2)
"""Seed 0 is the one with which the thresholds of the check were chosen."""
COPIES = 100
FOREIGN = {
    "de": [
        "Wo ist mein Paket?",
        "Ich möchte mein Geld zurück.",
        "Der Film war leider sehr langweilig.",
        "Meine Karte wurde am Automaten eingezogen",
        "wie lange dauert eine Überweisung",
        "Bitte mach das Licht in der Küche aus",
    ],
    "fr": [
        "Où est mon colis ?",
        "Je voudrais être remboursé",
        "Ce film était vraiment ennuyeux",
        "Ma carte a été avalée par le distributeur",
        "combien de temps prend un virement",
        "éteins la lumière de la cuisine s'il te plaît",
    ],
    "es": [
        "¿Dónde está mi paquete?",
        "Quiero que me devuelvan el dinero",
        "La película fue muy aburrida",
        "El cajero se ha tragado mi tarjeta",
        "cuánto tarda una transferencia",
        "apaga la luz de la cocina por favor",
    ],
    "it": [
        "Dov'è il mio pacco?",
        "Vorrei un rimborso",
        "Il film era davvero noioso",
        "Il bancomat ha trattenuto la mia carta",
        "quanto dura un bonifico",
        "spegni la luce in cucina per favore",
    ],
    "pl": [
        "Gdzie jest moja paczka?",
        "Chcę odzyskać pieniądze",
        "Film był bardzo nudny",
        "Bankomat zatrzymał moją kartę",
        "ile trwa przelew",
        "zgaś światło w kuchni proszę",
    ],
    "ru": ["Где моя посылка?", "Я хочу вернуть деньги", "Фильм был очень скучным", "Банкомат не вернул мою карту"],
    "zh": ["我的包裹在哪里", "我想退款", "这部电影很无聊"],
    "nl": [
        "Waar is mijn pakket?",
        "Ik wil mijn geld terug",
        "De film was erg saai",
        "De automaat heeft mijn kaart ingeslikt",
        "doe het licht in de keuken uit alsjeblieft",
    ],
    "tr": ["Paketim nerede?", "Bu filmi hiç sevmedim", "Mutfakta ne var, söyler misin"],
}
"""Sentences of the kind of the tasks, written for this benchmark."""


def entries_of(path: Path, prefix: str = "") -> list[TaskEntry]:
    """The tasks of a folder, with the columns that the check guesses."""
    found = find_tasks(path)
    schemas = infer_schemas(found)
    return [make_entry(prefix + name, files, schemas[name]) for name, files in found.items()]


def read_task(data: Path, name: str) -> CheckedTask:
    return read_tasks(entries_of(data / name), 0)[0]


def peak_memory_mib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


# All data as they are


def all_entries(data: Path) -> list[TaskEntry]:
    suites = [entry for suite in FAMILIES for entry in entries_of(data / "families" / suite, f"{suite}_")]
    return entries_of(data) + suites


def check_all(data: Path) -> Iterator[dict[str, Any]]:
    entries = all_entries(data)
    started = time.monotonic()
    report = check_tasks(entries, CheckSettings())
    seconds = time.monotonic() - started
    found: dict[str, dict[str, int]] = {}
    for finding in report.findings:
        counts = found.setdefault(finding.check, {})
        counts[finding.task] = counts.get(finding.task, 0) + finding.count
    yield {
        "part": "all",
        "tasks": len(report.tasks),
        "rows": sum(sum(task.rows.values()) for task in report.tasks),
        "seconds": round(seconds, 1),
        "peak_memory_mib": peak_memory_mib(),
        "found": found,
        "notes": report.notes,
    }


# Wrong labels


class CachedEncoder:
    """Computes the features of the same inputs once."""

    def __init__(self, encode: Callable[[Any], Any]) -> None:
        self._encode = encode
        self._inputs: Any = None
        self._features: Any = None

    def features(self, inputs: Any) -> Any:
        """The features of inputs."""
        if inputs != self._inputs:
            self._inputs, self._features = inputs, self._encode(inputs)
        return self._features


def tfidf(inputs: Sequence[tuple[str, ...]]) -> Any:
    """TF-IDF of character n-grams, with rows four times as long as those of the encoder: a penalty of a sixteenth."""
    vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4), sublinear_tf=True, max_features=20_000)
    return 4 * vectorizer.fit_transform([" | ".join(texts) for texts in inputs])


def flip_labels(data: CheckedTask, seed: int) -> tuple[CheckedTask, set[str]]:
    """A task of its training rows only, of which 5 % have another label, and the places of these."""
    rows, chance = list(data.splits["train"]), random.Random(seed)
    labels = sorted({str(row.target) for row in rows})
    places = set()
    for number in chance.sample(range(len(rows)), round(0.05 * len(rows))):
        row = rows[number]
        other = chance.choice([label for label in labels if label != row.target])
        rows[number] = replace(row, target=other)
        places.add(row.place)
    return replace(data, splits={"train": rows}), places


def check_flipped(data: Path) -> Iterator[dict[str, Any]]:
    minilm = TextEncoder(DEFAULT_BACKBONE, 128)
    for name in FLIPPED:
        task = read_task(data, name)
        for kind, encode in (("minilm", minilm.features), ("tfidf", tfidf)):
            encoder: Any = CachedEncoder(encode)
            for seed in SEEDS:
                damaged, places = flip_labels(task, seed)
                started = time.monotonic()
                findings, notes = check_label_errors(damaged, encoder, len(damaged.rows), seed=0)
                suspected = {example.place for finding in findings for example in finding.examples}
                yield {
                    "part": "flipped",
                    "task": name,
                    "features": kind,
                    "seed": seed,
                    "rows": len(damaged.rows),
                    "flipped": len(places),
                    "searched": not any("not searched" in note for note in notes),
                    "suspected": len(suspected),
                    "found": len(suspected & places),
                    "seconds": round(time.monotonic() - started, 1),
                }


# Copies of test rows


def change_case(text: str, chance: random.Random) -> str:
    return text.upper() if chance.random() < 0.5 else text.title()


def change_punctuation(text: str, chance: random.Random) -> str:
    bare = "".join(char for char in text if char.isalnum() or char.isspace() or char == "'")
    return bare + chance.choice(["!", " ...", "?!"])


def replace_word(text: str, chance: random.Random) -> str:
    words = text.split()
    words[chance.randrange(len(words))] = chance.choice(["really", "other", "thing", "green"])
    return " ".join(words)


def remove_word(text: str, chance: random.Random) -> str:
    words = text.split()
    del words[chance.randrange(len(words))]
    return " ".join(words)


def add_word(text: str, chance: random.Random) -> str:
    words = text.split()
    words.insert(chance.randrange(len(words) + 1), chance.choice(["really", "please", "then", "also"]))
    return " ".join(words)


CHANGES: dict[str, Callable[[str, random.Random], str]] = {
    "none": lambda text, _: text,
    "case": change_case,
    "punctuation": change_punctuation,
    "word replaced": replace_word,
    "word removed": remove_word,
    "word added": add_word,
}


def leaked(findings: Sequence[Finding]) -> dict[str, str]:
    """The name of the check by the place of each test row that it found among the training rows."""
    checks = ("leakage", "near_leakage")
    return {
        example.place: finding.check
        for finding in findings
        for example in finding.examples
        if finding.check in checks and "test" in finding.message and "train" in finding.message
    }


def check_copied(data: Path) -> Iterator[dict[str, Any]]:
    for name in COPIED:
        task = read_task(data, name)
        before = leaked(check_duplicates([task])[0])
        # Of short texts a word is a large part, so that copies of texts from five words on are made.
        rows = [
            row
            for row in task.splits["test"]
            if row.place not in before and min(len(text.split()) for text in row.texts) >= 5
        ]
        for change, apply in CHANGES.items():
            chance = random.Random(0)
            chosen = chance.sample(rows, min(COPIES, len(rows)))
            copies = [
                replace(row, split="train", texts=(apply(row.texts[0], chance), *row.texts[1:]), place=f"copy {number}")
                for number, row in enumerate(chosen)
            ]
            damaged = replace(task, splits={**task.splits, "train": [*task.splits["train"], *copies]})
            after = leaked(check_duplicates([damaged])[0])
            kinds = [after.get(row.place) for row in chosen]
            yield {
                "part": "copied",
                "task": name,
                "change": change,
                "copies": len(chosen),
                "equal": kinds.count("leakage"),
                "almost_equal": kinds.count("near_leakage"),
            }


# Contradictions and languages


def check_contradictory(data: Path) -> Iterator[dict[str, Any]]:
    for name in COPIED:
        task = read_task(data, name)
        chance = random.Random(0)
        rows = task.splits["train"]
        labels = sorted({str(row.target) for row in rows})
        chosen = chance.sample(rows, COPIES)
        copies = [
            replace(row, target=chance.choice([label for label in labels if label != row.target]), place="copy")
            for row in chosen
        ]
        damaged = replace(task, splits={"train": [*rows, *copies]})
        found = {
            example.place
            for finding in check_duplicates([damaged])[0]
            if finding.check == "contradictory"
            for example in finding.examples
        }
        count = sum(row.place in found for row in chosen)
        yield {"part": "contradictory", "task": name, "repeated": COPIES, "found": count}


def check_foreign(data: Path) -> Iterator[dict[str, Any]]:
    identify = LanguageIdentifier()
    sentences = [(code, text) for code, texts in FOREIGN.items() for text in texts]
    for name in (*COPIED, "families/tweeteval/emotion", "families/hwu64/music"):
        task = read_task(data, name)
        foreign = [
            CheckedRow(task.task.name, "train", (text,), "label", f"foreign {number} {code}")
            for number, (code, text) in enumerate(sentences)
        ]
        damaged = replace(task, splits={"train": [*task.rows, *foreign]})
        examples = [example for finding in check_languages(damaged, identify) for example in finding.examples]
        others = [example.text for example in examples if not example.place.startswith("foreign")]
        yield {
            "part": "foreign",
            "task": name,
            "rows": len(task.rows),
            "sentences": len(sentences),
            "found": len(examples) - len(others),
            "others": len(others),
            "first_others": others[:5],
        }
    findings = [finding for task in read_tasks(all_entries(data), 0) for finding in check_languages(task, identify)]
    found = [[finding.task, example.note, example.text] for finding in findings for example in finding.examples]
    yield {"part": "foreign", "task": "all as they are", "found": len(found), "rows_found": found}


# Tables of docs/data-quality.md


def print_tables(rows: Sequence[dict[str, Any]]) -> None:
    def of(part: str) -> list[dict[str, Any]]:
        return [row for row in rows if row["part"] == part]

    print("| task | MiniLM: precision | recall | TF-IDF: precision | recall |\n|---|---|---|---|---|")
    for name in FLIPPED:
        cells = []
        for features in ("minilm", "tfidf"):
            found = [row for row in of("flipped") if (row["task"], row["features"]) == (name, features)]
            searched = [row for row in found if row["searched"] and row["seed"] > 0]
            cells += (
                ["not searched", ""] if not searched else [_range(searched, "suspected"), _range(searched, "flipped")]
            )
        print(f"| {name.removeprefix('families/')} | {' | '.join(cells)} |")
    print("\n| change | " + " | ".join(name.removeprefix("families/") for name in COPIED) + " |")
    print("|---|" + "---|" * len(COPIED))
    for change in CHANGES:
        found = [row for row in of("copied") if row["change"] == change]
        print(f"| {change} | " + " | ".join(f"{row['equal']} + {row['almost_equal']}" for row in found) + " |")
    print(f"\n{[{key: row[key] for key in ('task', 'found', 'others') if key in row} for row in of('foreign')]}")
    for row in of("all"):
        print({check: sum(counts.values()) for check, counts in row["found"].items()})
        print(row["rows"], row["tasks"], row["seconds"], row["peak_memory_mib"])


def _range(rows: Sequence[dict[str, Any]], of_what: str) -> str:
    """The lowest and the highest share of found rows, of the suspected or the flipped ones."""
    shares = sorted(row["found"] / row[of_what] if row[of_what] else 0.0 for row in rows)
    return f"{shares[0]:.2f}" if len(rows) == 1 else f"{shares[0]:.2f} to {shares[-1]:.2f}"


PARTS = {
    "copied": check_copied,
    "contradictory": check_contradictory,
    "foreign": check_foreign,
    "flipped": check_flipped,
    "all": check_all,
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--tables", action="store_true", help="print the tables of the results and measure nothing")
    options = parser.parse_args(arguments)
    if options.tables:
        print_tables([json.loads(line) for line in options.output.read_text().splitlines()])
        return
    kept = []
    if options.output.is_file():
        lines = options.output.read_text().splitlines()
        kept = [line for line in lines if json.loads(line)["part"] not in options.only]
    with options.output.open("w") as file:
        file.writelines(f"{line}\n" for line in kept)
        for part in options.only:
            for row in PARTS[part](options.data):
                file.write(json.dumps(row) + "\n")
                file.flush()


if __name__ == "__main__":
    main()
