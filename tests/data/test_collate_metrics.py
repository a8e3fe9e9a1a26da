"""From examples to tensors and texts, from answers to scores."""

from __future__ import annotations

from math import sqrt
from typing import Any

import pytest
import torch
from helpers import VOCABULARY, tiny_tokenizer

from hyperadapters.config import Task
from hyperadapters.data.collate import Collator, make_collator
from hyperadapters.data.examples import Example
from hyperadapters.data.targets import read_answer, target_text
from hyperadapters.errors import DataError
from hyperadapters.training.metrics import score

MOOD = Task.classification("mood", ["no", "yes"])
PAIR = Task.classification("pair", ["no", "maybe", "yes"], fields=("text", "text_pair"))
SCORE = Task.regression("score", metrics=["pearson", "spearman"])
TEXT = Task.text_to_text("text")
ALL_METRICS = ["accuracy", "balanced_accuracy", "f1", "macro_f1", "matthews_correlation"]


def ids(words: str) -> list[int]:
    return [VOCABULARY.index(word) for word in words.split()]


def heads(**lengths: int) -> Collator:
    return make_collator("encoder", tiny_tokenizer(), [MOOD, PAIR, SCORE], **lengths)


def writer(*tasks: Task, **lengths: int) -> Collator:
    """A collator for text-to-text whose tokenizer knows the tasks' prompts."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"{task.name}:" for task in tasks] + ["{text_pair}"])
    return make_collator("encoder-decoder", tokenizer, tasks, **lengths)


def prompts(collator: Collator, *examples: Example) -> list[str]:
    found = collator.tokenizer.batch_decode(collator(examples)["input_ids"])
    return [text.replace(" <pad>", "") for text in found]


# Backbones with heads


def test_texts_are_padded_to_the_longest_of_the_batch() -> None:
    batch = heads()([Example(0, "w1 w2 w3"), Example(0, "w4")])
    assert batch["input_ids"].tolist() == [ids("w1 w2 w3 </s>"), ids("w4 </s> <pad> <pad>")]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_pairs_and_single_texts_share_a_batch() -> None:
    batch = heads()([Example(0, "w1"), Example(1, "w2 w3", "w4")])
    assert batch["input_ids"].tolist() == [ids("w1 </s> <pad> <pad> <pad>"), ids("w2 w3 </s> w4 </s>")]


def test_empty_second_text_is_still_a_pair() -> None:
    assert heads()([Example(1, "w1", "")])["input_ids"].tolist() == [ids("w1 </s> </s>")]


def test_long_inputs_are_cut_at_max_length() -> None:
    batch = heads(max_length=5)([Example(0, "w1 w2 w3 w4 w5 w6"), Example(1, "w1 w2 w3 w4", "w5")])
    assert batch["input_ids"].tolist() == [ids("w1 w2 w3 w4 </s>"), ids("w1 w2 </s> w5 </s>")]


def test_targets_of_heads_are_indices_and_numbers_in_float32() -> None:
    batch = heads()([Example(0, "w1", target=1), Example(1, "w1", "w2", target=2), Example(2, "w1", target=-3.5)])
    assert batch["labels"].tolist() == [1.0, 2.0, -3.5]
    assert batch["labels"].dtype == torch.float32


def test_task_ids_are_whole_numbers_one_a_row() -> None:
    batch = heads()([Example(2, "w1"), Example(0, "w1")])
    assert batch["task_ids"].tolist() == [2, 0]
    assert batch["task_ids"].dtype == torch.long


def test_batch_with_a_row_of_unknown_task_has_neither_tasks_nor_labels() -> None:
    batch = heads()([Example(0, "w1", target=1), Example(None, "w2")])
    assert batch.keys() == {"input_ids", "attention_mask", "sequence_ids"}


def test_batch_with_a_row_of_unknown_target_has_no_labels() -> None:
    batch = heads()([Example(0, "w1", target=1), Example(0, "w2")])
    assert batch.keys() == {"input_ids", "attention_mask", "sequence_ids", "task_ids"}


def test_target_zero_is_a_target() -> None:
    assert heads()([Example(0, "w1", target=0)])["labels"].tolist() == [0.0]


# Text-to-text backbones


def test_default_prompt_is_the_fields() -> None:
    found = prompts(writer(MOOD, PAIR), Example(0, "w1 w2"), Example(1, "w1", "w2"))
    assert found == ["w1 w2 </s>", "w1 w2 </s>"]


def test_prompt_of_an_unknown_task_is_the_fields_alone() -> None:
    found = prompts(writer(MOOD, PAIR), Example(None, "w1"), Example(None, "w1", "w2"))
    assert found == ["w1 </s>", "w1 w2 </s>"]


def test_template_places_the_fields() -> None:
    task = PAIR.model_copy(update={"template": "red {text_pair} blue {text} {text}"})
    assert prompts(writer(task), Example(0, "w1", "w2")) == ["red w2 blue w1 w1 </s>"]


def test_braces_in_a_text_are_not_filled() -> None:
    task = PAIR.model_copy(update={"template": "{text} : {text_pair}"})
    assert prompts(writer(task), Example(0, "{text_pair}", "w2")) == ["{text_pair} : w2 </s>"]


def test_long_prompts_are_cut_at_max_length() -> None:
    assert prompts(writer(MOOD, max_length=4), Example(0, "w1 w2 w3 w4 w5")) == ["w1 w2 w3 </s>"]


def test_target_tokens_are_padded_with_minus_100() -> None:
    batch = writer(TEXT)([Example(0, "w1", target="w2"), Example(0, "w1", target="w3 w4 w5")])
    assert batch["labels"].tolist() == [[*ids("w2 </s>"), -100, -100], ids("w3 w4 w5 </s>")]


def test_long_targets_are_cut_at_max_target_length() -> None:
    batch = writer(TEXT, max_target_length=3)([Example(0, "w1", target="w3 w4 w5 w6")])
    assert batch["labels"].tolist() == [ids("w3 w4 </s>")]


def test_tasks_of_all_kinds_share_a_batch() -> None:
    words = MOOD.model_copy(update={"verbalizer": {"no": "bad", "yes": "good"}})
    batch = writer(words, PAIR, TEXT)(
        [Example(0, "w1", target=1), Example(1, "w1", "w2", target=0), Example(2, "w1", target="red blue")]
    )
    assert batch["task_ids"].tolist() == [0, 1, 2]
    assert batch["labels"].tolist() == [[*ids("good </s>"), -100], [*ids("no </s>"), -100], ids("red blue </s>")]


# Targets as texts, texts as answers


def test_label_is_written_as_its_word_or_as_itself() -> None:
    words = Task.classification("mood", ["no", "yes"], verbalizer={"no": "0", "yes": "1"})
    assert [target_text(words, index) for index in (0, 1)] == ["0", "1"]
    assert [target_text(MOOD, index) for index in (0, 1)] == ["no", "yes"]


@pytest.mark.parametrize(
    ("step", "number", "text"),
    [
        (0.2, 3.7, "3.6"),
        (0.2, 3.71, "3.8"),
        (0.2, 4.7999, "4.8"),
        (0.2, 5, "5.0"),
        (0.2, -0.05, "0.0"),
        (0.25, 3.1, "3.0"),
        (1, 2.6, "3.0"),
        (10, 26, "30.0"),
        (None, 3.7123, "3.7123"),
        (None, 3, "3.0"),
    ],
)
def test_number_is_written_as_the_nearest_multiple_of_the_step(step: float | None, number: float, text: str) -> None:
    assert target_text(Task.regression("score", step=step), number) == text


@pytest.mark.parametrize(
    ("task", "text", "answer"),
    [
        (MOOD, "yes", 1),
        (MOOD, " no\n", 0),
        (MOOD, "Yes", None),
        (MOOD, "yes yes", None),
        (MOOD, "", None),
        (SCORE, "3.8", 3.8),
        (SCORE, " -2 ", -2.0),
        (SCORE, "three", None),
        (SCORE, "3,8", None),
        (SCORE, "", None),
        (TEXT, " red blue ", "red blue"),
        (TEXT, "", ""),
    ],
)
def test_generated_text_is_read_as_an_answer(task: Task, text: str, answer: float | str | None) -> None:
    assert read_answer(task, text) == answer


@pytest.mark.parametrize("text", ["nan", "inf", "-Infinity"])
def test_generated_text_that_is_no_finite_number_is_no_answer(text: str) -> None:
    assert read_answer(SCORE, text) is None


def test_label_is_not_read_where_it_has_a_word() -> None:
    words = Task.classification("mood", ["no", "yes"], verbalizer={"no": "yes", "yes": "fine"})
    assert [read_answer(words, text) for text in ("yes", "fine", "no")] == [0, 1, None]


@pytest.mark.parametrize(
    ("task", "target"), [(MOOD, 0), (PAIR, 2), (SCORE, -1.25), (Task.regression("s", step=0.2), 3.6), (TEXT, "red")]
)
def test_what_is_written_is_read_back(task: Task, target: Any) -> None:
    assert read_answer(task, target_text(task, target)) == target


# Scores


def test_scores_of_two_labels_by_hand() -> None:
    # label 1: 2 right, 1 too many, 1 missed; label 0: 1 right, 1 too many, 1 missed
    task = Task.classification("mood", ["no", "yes"], metrics=ALL_METRICS)
    assert score(task, [0, 1, 1, 0, 1], [0, 1, 0, 1, 1]) == pytest.approx(
        {
            "accuracy": 3 / 5,
            "balanced_accuracy": (1 / 2 + 2 / 3) / 2,
            "f1": 2 / 3,
            "macro_f1": (2 / 3 + 1 / 2) / 2,
            "matthews_correlation": 1 / 6,
        }
    )


def test_f1_is_of_the_last_label() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=["f1"])
    assert score(task, [0, 0, 0, 1], [0, 0, 1, 1]) == pytest.approx({"f1": 2 / 3})
    assert score(task, [1, 1, 1, 0], [1, 1, 0, 0]) == pytest.approx({"f1": 4 / 5})


@pytest.mark.parametrize(
    ("targets", "answers", "expected"),
    [
        ([0, 1], [0, 1], 1.0),  # nobody names the third label
        ([2, 2], [2, 2], 1.0),
        ([0], [0], 1.0),
        ([0, 1], [0, 2], 1 / 3),  # labels 1 and 2 are named once each, in vain
        ([0, 1], [0, None], 1 / 2),  # no answer is wrong, and no label of its own
        ([0, 0], [None, None], 0.0),
    ],
)
def test_macro_f1_is_over_the_labels_of_targets_and_answers(
    targets: list[int], answers: list[int | None], expected: float
) -> None:
    task = Task.classification("mood", ["a", "b", "c"], metrics=["macro_f1"])
    assert score(task, targets, answers) == pytest.approx({"macro_f1": expected})


@pytest.mark.parametrize("task", [MOOD, SCORE, TEXT], ids=lambda task: task.kind)
def test_no_rows_have_no_score(task: Task) -> None:
    with pytest.raises(DataError, match=f"task '{task.name}': expected at least one row to score"):
        score(task, [], [])


def test_an_answer_that_is_not_a_number_is_no_label() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=ALL_METRICS)
    assert score(task, [0, 1, 1], [0, float("nan"), 1]) == score(task, [0, 1, 1], [0, None, 1])


@pytest.mark.parametrize("target", [0, 1])
def test_one_row_has_a_score_in_every_metric(target: int) -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=ALL_METRICS)
    assert score(task, [target], [target]) == {
        "accuracy": 1.0,
        "balanced_accuracy": 1.0,  # over the labels of the targets
        "f1": float(target),  # as in scikit-learn, 0 where the last label is neither a target nor an answer
        "macro_f1": 1.0,
        "matthews_correlation": 0.0,
    }
    assert score(SCORE, [2.5], [2.5]) == {"pearson": 0.0, "spearman": 0.0}


def test_missing_answer_counts_as_wrong() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=ALL_METRICS)
    assert score(task, [0, 1, 1], [0, None, 1]) == pytest.approx(
        {
            "accuracy": 2 / 3,
            "balanced_accuracy": (1 + 1 / 2) / 2,
            "f1": 2 / 3,
            "macro_f1": (1 + 2 / 3) / 2,
            "matthews_correlation": 3 / (2 * sqrt(6)),
        }
    )


def test_no_answers_at_all_score_zero() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=ALL_METRICS)
    assert score(task, [0, 1], [None, None]) == dict.fromkeys(ALL_METRICS, 0.0)


def test_constant_guess_has_no_matthews_correlation() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=["matthews_correlation"])
    assert score(task, [0, 1, 1], [1, 1, 1]) == {"matthews_correlation": 0.0}


@pytest.mark.parametrize(
    ("targets", "answers", "pearson", "spearman"),
    [
        ([1, 2, 3, 4], [2, 1, 4, 3], 0.6, 0.6),
        ([1, 2, 3], [1, 4, 9], 8 * sqrt(3) / 14, 1.0),
        ([1, 2, 2, 3], [1, 2, 3, 4], 3 / sqrt(10), 4.5 / sqrt(22.5)),
        ([1, 2, 3], [3, 2, 1], -1.0, -1.0),
        ([1, 2, 3], [1, 2, None], 0.5, 0.5),
        ([1, 2, 3], [1, 2, float("nan")], 0.5, 0.5),
        ([1, 2, 3], [float("inf"), 2, 3], 0.5, 0.5),
        ([1, 2, 3], [2, 2, 2], 0.0, 0.0),
        ([2, 2, 2], [1, 2, 3], 0.0, 0.0),
        ([1, 2, 3], [None, None, None], 0.0, 0.0),
        ([1, 2, 3], [None, 5.0, None], 0.0, 0.0),
    ],
    ids=[
        "swapped",
        "monotone",
        "ties",
        "reversed",
        "no answer",
        "nan",
        "infinite",
        "constant answers",
        "constant targets",
        "no answers",
        "one answer",
    ],
)
def test_correlations_by_hand(targets: list[Any], answers: list[Any], pearson: float, spearman: float) -> None:
    assert score(SCORE, targets, answers) == pytest.approx({"pearson": pearson, "spearman": spearman})


def test_exact_match_ignores_spaces_around_the_target_and_nothing_else() -> None:
    assert score(TEXT, ["red ", " blue", "red", "red"], ["red", "blue", "Red", None]) == {"exact_match": 0.5}


@pytest.mark.parametrize(
    ("target", "answer", "value"),
    [
        ("the Eiffel Tower", "Eiffel tower.", 1.0),
        ("a red house", "red red car", 0.4),  # one of two and of three words
        ("red", "blue", 0.0),
        ("red", "", 0.0),
        ("the", "a", 1.0),
        ("red", None, 0.0),
    ],
)
def test_token_f1_compares_words_without_articles_and_punctuation(target: str, answer: str, value: float) -> None:
    task = Task.text_to_text("question", metrics=["token_f1"])
    assert score(task, [target], [answer]) == pytest.approx({"token_f1": value})


def test_rouge_compares_words_pairs_of_words_and_the_longest_common_subsequence() -> None:
    task = Task.text_to_text("summary", metrics=["rouge_1", "rouge_2", "rouge_l"])
    found = score(task, ["the cat sat down", "one"], ["the cat down sat", None])
    # Of four words each, all are common; one of three pairs; and a subsequence of three. The second row counts as 0.
    assert found == pytest.approx({"rouge_1": 0.5, "rouge_2": 1 / 6, "rouge_l": 0.375})


def test_scores_are_in_the_order_of_the_metrics() -> None:
    task = Task.classification("mood", ["no", "yes"], metrics=["macro_f1", "accuracy"])
    assert list(score(task, [0, 1], [0, 1])) == ["macro_f1", "accuracy"]


def test_targets_and_answers_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="argument 2 is shorter"):
        score(TEXT, ["a", "b"], ["a"])
