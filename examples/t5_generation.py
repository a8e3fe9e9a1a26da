"""Generation with an encoder-decoder: the same words get different answers, depending on the task.

The backbone is a tiny T5 with random weights, so that the example runs anywhere in seconds. With a real one, only two
lines change: `HyperAdapterModel.from_backbone("google-t5/t5-base", tasks)` makes the model, with its own tokenizer.
Run it with `python examples/t5_generation.py`.
"""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import ModelConfig

COUNTRIES = {
    "France": ("Paris", "euro"),
    "Japan": ("Tokyo", "yen"),
    "Norway": ("Oslo", "krone"),
    "Poland": ("Warsaw", "zloty"),
    "India": ("Delhi", "rupee"),
    "Spain": ("Madrid", "euro"),
}
WORDS = sorted({"<pad>", "</s>", "<unk>", "of", *COUNTRIES, *(word for pair in COUNTRIES.values() for word in pair)})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words that ends each text with </s>."""
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", vocabulary["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


torch.manual_seed(0)
sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4}
places = {"pad_token_id": WORDS.index("<pad>"), "eos_token_id": WORDS.index("</s>")}
config = T5Config(vocab_size=len(WORDS), decoder_start_token_id=places["pad_token_id"], **sizes, **places)
tasks = [Task.text_to_text(name, metrics=("exact_match",)) for name in ("capital", "currency")]
model = HyperAdapterModel(T5ForConditionalGeneration(config), tasks, ModelConfig(adapter_dim=32))
model.tokenizer = tiny_tokenizer()

rows = {
    task.name: [{"text": f"of {country}", "label": answers[place]} for country, answers in COUNTRIES.items()]
    for place, task in enumerate(tasks)
}
arguments = TrainingArguments(max_steps=100, per_device_train_batch_size=12, learning_rate=1e-2, logging_steps=50)
Trainer(model, rows, args=arguments).train()

for name in ("capital", "currency"):
    answers = model.predict([f"of {country}" for country in COUNTRIES], task=name)
    print(name, {country: answer.text for country, answer in zip(COUNTRIES, answers, strict=True)})
