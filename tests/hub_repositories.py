"""Data as the repositories of the Hub have them that the catalogue names: columns, names of classes and splits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import datasets
import yaml
from datasets import ClassLabel, Features

BOOL = ("False", "True")
NLI = ("entailment", "neutral", "contradiction")
RTE = ("entailment", "not_entailment")
TEST = ("train", "test")
ANLI = [f"{split}_r{number}" for split in ("train", "dev", "test") for number in (1, 2, 3)]
INTENTS = ("card_lost", "transfer", "refund")


class Classes(tuple[str, ...]):
    """Names of classes, whose indices are in the data."""


class Schema(NamedTuple):
    """Data of a configuration of a repository.

    Attributes:
        texts: Columns of texts.
        label: Column of the label, and its classes, its texts, or what it contains.
        splits: Splits, of which those without labels have the class -1.
        others: Values of other columns by the number of a row.
    """

    texts: str
    label: dict[str, Any]
    splits: tuple[str, ...] | list[str] = ("train", "validation", "test")
    others: dict[str, Any] = {}


def classes(*names: str) -> dict[str, Any]:
    return {"label": Classes(names)}


SCHEMAS = {
    "nyu-mll/glue": {
        "cola": Schema("sentence", classes("unacceptable", "acceptable")),
        "sst2": Schema("sentence", classes("negative", "positive")),
        "mrpc": Schema("sentence1 sentence2", classes("not_equivalent", "equivalent")),
        "qqp": Schema("question1 question2", classes("not_duplicate", "duplicate")),
        "stsb": Schema("sentence1 sentence2", {"label": [1.6, 3.0, 4.19]}),
        "mnli": Schema("premise hypothesis", classes(*NLI), ("train", "validation_matched", "validation_mismatched")),
        "qnli": Schema("question sentence", classes(*RTE)),
        "rte": Schema("sentence1 sentence2", classes(*RTE)),
        "wnli": Schema("sentence1 sentence2", classes("not_entailment", "entailment")),
    },
    "aps/super_glue": {
        "boolq": Schema("question passage", classes(*BOOL)),
        "cb": Schema("premise hypothesis", classes("entailment", "contradiction", "neutral")),
        "copa": Schema("premise choice1 choice2 question", classes("choice1", "choice2")),
        "multirc": Schema("paragraph question answer", classes(*BOOL), others={"idx": {"answer": 1}}),
        "record": Schema("passage query", {}, others={"entities": ["Ada", "Bob", "Cleo"], "answers": ["Bob", "Cleo"]}),
        "rte": Schema("premise hypothesis", classes(*RTE)),
        "wic": Schema("word sentence1 sentence2", classes(*BOOL), others={"start1": 0, "end1": 4}),
        "wsc.fixed": Schema("text span1_text span2_text", classes(*BOOL), others={"span1_index": 0, "span2_index": 3}),
    },
    "mrqa-workshop/mrqa": {
        "plain_text": Schema(
            "context question",
            {"subset": ["SQuAD", "NewsQA", "TriviaQA-web", "SearchQA", "HotpotQA", "NaturalQuestionsShort"]},
            others={"answers": ["right", "also right"], "context_tokens": [{"tokens": "a", "offsets": 0}]},
        )
    },
    "allenai/scitail": {"snli_format": Schema("sentence1 sentence2", {"gold_label": ["entailment", "neutral"]})},
    "stanfordnlp/snli": {"plain_text": Schema("premise hypothesis", classes(*NLI))},
    "facebook/anli": {"plain_text": Schema("uid premise hypothesis reason", classes(*NLI), ANLI)},
    "tasksource/sick": {"default": Schema("sentence_A sentence_B", classes(*NLI))},
    "google-research-datasets/paws": {"labeled_final": Schema("sentence1 sentence2", classes("0", "1"))},
    "fancyzhx/yelp_polarity": {"plain_text": Schema("text", classes("1", "2"), TEST)},
    "stanfordnlp/imdb": {"plain_text": Schema("text", classes("neg", "pos"), TEST)},
    "tasksource/trec": {
        "default": Schema(
            "text",
            {"coarse_label": Classes(("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM")), "fine_label": Classes(("a", "b"))},
            TEST,
        )
    },
    "SetFit/subj": {"default": Schema("text", {"label": [0, 1], "label_text": ["objective", "subjective"]}, TEST)},
    "legacy-datasets/banking77": {"default": Schema("text", classes(*INTENTS), TEST)},
    "clinc/clinc_oos": {"plus": Schema("text", {"intent": Classes(INTENTS)})},
    "FastFit/hwu_64": {"default": Schema("text", {"label": list(INTENTS)})},
    "cardiffnlp/tweet_eval": {
        "emotion": Schema("text", classes("anger", "joy", "optimism", "sadness")),
        "stance_climate": Schema("text", classes("none", "against", "favor")),
    },
    "allenai/winogrande": {"winogrande_l": Schema("sentence option1 option2", {"answer": ["1", "2"]})},
    "tasksource/social_i_qa": {
        "default": Schema("context question answerA answerB answerC", {"label": ["1", "2\n", "3"]})
    },
    "Samsoup/cosmos_qa": {
        "default": Schema("context question answer0 answer1 answer2 answer3", {"label": [0, 1, 2, 3]})
    },
    "Rowan/hellaswag": {
        "default": Schema("ctx", {"label": ["0", "1", "2", "3"]}, others={"endings": ["a", "b", "c", "d"]})
    },
    "tau/commonsense_qa": {
        "default": Schema(
            "question",
            {"answerKey": list("ABCDE")},
            others={"choices": {"label": list("ABCDE"), "text": list("vwxyz")}},
        )
    },
    "EdinburghNLP/xsum": {"default": Schema("document summary", {})},
    "abisee/cnn_dailymail": {"3.0.0": Schema("article highlights", {})},
}


def has_label(repository: str, split: str, number: int) -> bool:
    """Return whether a row is labelled: the test rows of GLUE and SuperGLUE are not, and some rows of SNLI."""
    if repository == "stanfordnlp/snli":
        return number % 7 != 0
    return split != "test" or repository not in ("nyu-mll/glue", "aps/super_glue")


def row_of(repository: str, schema: Schema, split: str, number: int) -> dict[str, Any]:
    row = {text: f"{text} {split} {number}" for text in schema.texts.split()}
    for column, values in schema.label.items():
        index = number % len(values)
        is_class = isinstance(values, Classes)
        row[column] = (index if has_label(repository, split, number) else -1) if is_class else values[index]
    return {**row, **schema.others}


def write_repository(root: Path, repository: str, num_rows: int, train_rows: int | None = None) -> None:
    """Write the Parquet files of a repository, and the card that names them.

    Args:
        root: Folder of all repositories.
        repository: Name of the repository, which is a key of `SCHEMAS`.
        num_rows: Number of rows of a split.
        train_rows: Number of training rows. Default: `num_rows`.
    """
    folder, card = root / repository, []
    for name, schema in SCHEMAS[repository].items():
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in schema.splits]
        card.append({"config_name": name, "data_files": files})
        for file in files:
            count = num_rows if file["split"] != "train" or train_rows is None else train_rows
            rows = [row_of(repository, schema, file["split"], number) for number in range(count)]
            classes = {name: ClassLabel(names=list(v)) for name, v in schema.label.items() if isinstance(v, Classes)}
            features = Features({**datasets.Dataset.from_list(rows[:1]).features, **classes})
            path = folder / file["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows, features).to_parquet(path)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': card})}---\n")
