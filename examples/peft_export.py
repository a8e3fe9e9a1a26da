"""Export to PEFT: one model generates the LoRA of each task, and PEFT loads them like any others.

vLLM and LoRAX serve such folders, too. The backbone is a tiny Llama with random weights, so that the example runs
anywhere in seconds; with a real one, `HyperAdapterModel.from_backbone(NAME, tasks, form="lora")` makes the model. Needs
the extra `peft`. Run it with `python examples/peft_export.py`.
"""

import tempfile
from pathlib import Path

import torch
from peft import PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hyperadapters import HyperAdapterModel, Task, Trainer, TrainingArguments
from hyperadapters.config import ModelConfig
from hyperadapters.interop.peft import export_peft

ROWS = {
    "mood": [("a fine day", "happy"), ("a sad song", "unhappy"), ("a fine song", "happy"), ("a sad day", "unhappy")],
    "noun": [("a fine day", "day"), ("a sad song", "song"), ("a fine song", "song"), ("a sad day", "day")],
}
WORDS = ["<pad>", "</s>", "<unk>", ":", "a", "fine", "sad", "day", "song", "happy", "unhappy"]


def tiny_backbone() -> LlamaForCausalLM:
    """Make the same tiny language model at each call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=1, **sizes))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


tasks = [Task.text_to_text(name, template="{text} :") for name in ROWS]
model = HyperAdapterModel(tiny_backbone(), tasks, ModelConfig(form="lora", lora_rank=8))
model.tokenizer = tiny_tokenizer()
data = {name: [{"text": text, "label": label} for text, label in rows] for name, rows in ROWS.items()}
Trainer(model, data, args=TrainingArguments(max_steps=60, learning_rate=1e-3, logging_steps=30)).train()
print([row.text for row in model.predict(data["mood"], task="mood")])

with tempfile.TemporaryDirectory() as folder:
    for task in tasks:
        export_peft(model, task.name, Path(folder) / task.name)
    loaded = PeftModel.from_pretrained(tiny_backbone(), Path(folder) / "mood", adapter_name="mood")
    loaded.load_adapter(Path(folder) / "noun", adapter_name="noun")
    prompt = model.tokenizer(["a fine song :"], return_tensors="pt")
    for task_id, task in enumerate(tasks):
        loaded.set_adapter(task.name)
        with torch.no_grad():
            theirs, ours = loaded(**prompt).logits, model(**prompt, task_ids=torch.tensor([task_id])).logits
        next_word = model.tokenizer.decode(theirs[0, -1].argmax())
        print(f"{task.name}: PEFT continues with '{next_word}', largest difference {(theirs - ours).abs().max():.0e}")
