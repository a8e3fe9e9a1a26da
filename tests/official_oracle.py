"""The released implementation written down a second time, to have numbers for sizes without golden values.

Plain torch on a dictionary of tensors under the official names, in the precision of those tensors; nothing of the
package is used. `forward` and `losses` compute what the released code computes on a T5, dropout left out; where that
code returns something that is not a number, it is said.

Shapes: B rows, S source positions, T target positions, d `d_model`, a adapter size, N tasks, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

PROTOTYPE_DIM = 64
HIDDEN_DIM = 128
TEMPERATURE = 0.1
CONTRASTIVE_WEIGHT = 0.1
LABEL_SMOOTHING = 0.1
PAD = 0
MAX_DISTANCE = 128

State = Mapping[str, Tensor]
Config = Mapping[str, Any]


class Terms(NamedTuple):
    """The terms of the objective, which is their sum; the contrastive ones carry their weight."""

    task: Tensor
    instance: Tensor
    prototype: Tensor


# Parameters


def parameter_shapes(config: Config, num_tasks: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of a released model, each tied weight once."""
    width, vocabulary = config["d_model"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (vocabulary, width)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, width)
    for side, depth, adapter in (
        ("encoder", config["num_layers"], config["encoder_adapter_dim"]),
        ("decoder", config["num_decoder_layers"], config["decoder_adapter_dim"]),
    ):
        for layer in range(depth):
            block = _block_shapes(config, side == "decoder", has_position_bias=layer == 0, adapter=adapter)
            shapes.update({f"{side}.block.{layer}.layer.{name}": shape for name, shape in block.items()})
        shapes[f"{side}.final_layer_norm.weight"] = (width,)
    linears = {
        "decoder.mlp.0": (HIDDEN_DIM, width),
        "decoder.mlp.2": (PROTOTYPE_DIM, HIDDEN_DIM),
        "decoder.param_gen.decoder.linear1": (HIDDEN_DIM, 2 * PROTOTYPE_DIM),
        "decoder.param_gen.decoder.linear2": (PROTOTYPE_DIM, HIDDEN_DIM),
        "decoder.param_gen.decoder.weight_up": (width * config["decoder_adapter_dim"], PROTOTYPE_DIM),
        "decoder.param_gen.decoder.weight_down": (width * config["decoder_adapter_dim"], PROTOTYPE_DIM),
        "decoder.param_gen.decoder.bias_up": (width, PROTOTYPE_DIM),
        "decoder.param_gen.decoder.bias_down": (config["decoder_adapter_dim"], PROTOTYPE_DIM),
    }
    for name, shape in linears.items():
        shapes.update({f"{name}.weight": shape, f"{name}.bias": shape[:1]})
    shapes["decoder.param_gen.decoder.LayerNorm.weight"] = (PROTOTYPE_DIM,)
    shapes["decoder.param_gen.decoder.LayerNorm.bias"] = (PROTOTYPE_DIM,)
    shapes["decoder.param_gen.layer_embed.weight"] = (config["num_decoder_layers"], PROTOTYPE_DIM)
    shapes["decoder.adapter_task_embedding.weight"] = (num_tasks, PROTOTYPE_DIM)
    return shapes


def _block_shapes(
    config: Config, in_decoder: bool, has_position_bias: bool, adapter: int
) -> dict[str, tuple[int, ...]]:
    """Name, within the block, and shape of the parameters of one block with its learned adapter."""
    width, inner, hidden = config["d_model"], config["d_kv"] * config["num_heads"], config["d_ff"]
    shapes: dict[str, tuple[int, ...]] = {}
    attentions = ("0.SelfAttention", "1.EncDecAttention") if in_decoder else ("0.SelfAttention",)
    last = len(attentions)
    for attention in attentions:
        shapes.update({f"{attention}.{part}.weight": (inner, width) for part in "qkv"})
        shapes[f"{attention}.o.weight"] = (width, inner)
    if has_position_bias:
        shapes["0.SelfAttention.relative_attention_bias.weight"] = (
            config["relative_attention_num_buckets"],
            config["num_heads"],
        )
    for part in ("wi_0", "wi_1") if _is_gated(config) else ("wi",):
        shapes[f"{last}.DenseReluDense.{part}.weight"] = (hidden, width)
    shapes[f"{last}.DenseReluDense.wo.weight"] = (width, hidden)
    for side, shape in (("down", (adapter, width)), ("up", (width, adapter))):
        shapes[f"{last}.adapter_layer.adapter_{side}_manual.weight"] = shape
        shapes[f"{last}.adapter_layer.adapter_{side}_manual.bias"] = shape[:1]
    shapes.update({f"{sublayer}.layer_norm.weight": (width,) for sublayer in range(last + 1)})
    return shapes


def random_state(config: Config, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Normal numbers for every parameter, at sizes that make each of them visible in the output."""
    return {
        name: torch.randn(shape, generator=generator) * _spread(name) + ("norm.weight" in name.lower())
        for name, shape in parameter_shapes(config, num_tasks).items()
    }


def _spread(name: str) -> float:
    """Standard deviation of a parameter's numbers: large in embeddings, small where adapters are generated."""
    if any(part in name for part in ("shared", "relative_attention_bias", "layer_embed", "task_embedding")):
        return 1.0
    if "param_gen" in name and "LayerNorm" not in name:
        return 0.05 if name.endswith("weight") else 0.1
    return 0.2


def is_trainable(name: str) -> bool:
    """Whether the released code unfreezes the parameter of this name."""
    return any(part in name for part in ("adapter", "mlp", "param_gen")) and ("encoder" in name or "decoder" in name)


# Forward


def forward(state: State, config: Config, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits [B, T, V] and the instance vectors [B, 64] of a batch."""
    lower_output = encode(state, config, batch["input_ids"], batch["attention_mask"])
    instances = retrieve(state, lower_output, batch["attention_mask"])
    decoder_input_ids = F.pad(batch["labels"], (1, -1), value=PAD)
    prototypes = state["decoder.adapter_task_embedding.weight"][batch["task_ids"]]
    decoded = decode(state, config, decoder_input_ids, lower_output, batch["attention_mask"], prototypes)
    if config["tie_word_embeddings"]:
        return decoded * config["d_model"] ** -0.5 @ state["shared.weight"].T, instances
    return decoded @ state["lm_head.weight"].T, instances


def encode(state: State, config: Config, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The encoder's last hidden state [B, S, d]: T5 blocks with a learned adapter beside each feed-forward."""
    hidden = state["shared.weight"][input_ids]
    bias = position_bias(state, config, "encoder", input_ids.shape[1])
    bias = bias + (1 - attention_mask)[:, None, None, :] * -10000.0
    for layer in range(config["num_layers"]):
        block = f"encoder.block.{layer}.layer"
        normed = rms_norm(state, config, f"{block}.0.layer_norm", hidden)
        hidden = hidden + attend(state, config, f"{block}.0.SelfAttention", normed, normed, bias)
        normed = rms_norm(state, config, f"{block}.1.layer_norm", hidden)
        adapted = learned_adapter(state, f"{block}.1.adapter_layer", normed if config["adapter_norm_input"] else hidden)
        hidden = hidden + feed_forward(state, config, f"{block}.1.DenseReluDense", normed) + adapted
    return rms_norm(state, config, "encoder.final_layer_norm", hidden)


def retrieve(state: State, lower_output: Tensor, attention_mask: Tensor) -> Tensor:
    """Instance vectors [B, 64]: mean of the encoder's output over real positions, then a two-layer network."""
    pooled = (lower_output * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
    return linear(state, "decoder.mlp.2", linear(state, "decoder.mlp.0", pooled).relu())


def decode(
    state: State, config: Config, input_ids: Tensor, lower_output: Tensor, attention_mask: Tensor, prototypes: Tensor
) -> Tensor:
    """The decoder's last hidden state [B, T, d]: T5 blocks with a generated adapter beside each feed-forward."""
    length = input_ids.shape[1]
    hidden = state["shared.weight"][input_ids]
    self_bias = position_bias(state, config, "decoder", length) + torch.ones(length, length).triu(1) * -10000.0
    cross_bias = (1 - attention_mask)[:, None, None, :] * -1e9
    for layer in range(config["num_decoder_layers"]):
        block = f"decoder.block.{layer}.layer"
        normed = rms_norm(state, config, f"{block}.0.layer_norm", hidden)
        hidden = hidden + attend(state, config, f"{block}.0.SelfAttention", normed, normed, self_bias)
        normed = rms_norm(state, config, f"{block}.1.layer_norm", hidden)
        hidden = hidden + attend(state, config, f"{block}.1.EncDecAttention", normed, lower_output, cross_bias)
        normed = rms_norm(state, config, f"{block}.2.layer_norm", hidden)
        adapted = generated_adapter(
            state, config, layer, prototypes, normed if config["adapter_norm_input"] else hidden
        )
        hidden = hidden + feed_forward(state, config, f"{block}.2.DenseReluDense", normed) + adapted
    return rms_norm(state, config, "decoder.final_layer_norm", hidden)


# Parts of T5


def linear(state: State, name: str, inputs: Tensor) -> Tensor:
    """`x W^T`, plus the bias if the layer has one."""
    return F.linear(inputs, state[f"{name}.weight"], state.get(f"{name}.bias"))


def rms_norm(state: State, config: Config, name: str, hidden: Tensor) -> Tensor:
    """T5's layer norm: divide by the root mean square, multiply by a weight; no centring, no bias."""
    mean_square = hidden.square().mean(dim=-1, keepdim=True)
    return hidden / (mean_square + config["layer_norm_epsilon"]).sqrt() * state[f"{name}.weight"]


def position_bias(state: State, config: Config, side: str, length: int) -> Tensor:
    """Bias [1, heads, length, length] of self-attention by distance from query to key; block 0 owns it for all."""
    positions = torch.arange(length)
    distances = positions[None, :] - positions[:, None]
    table = state[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    return table[distance_buckets(distances, len(table), side == "encoder")].permute(2, 0, 1)[None]


def distance_buckets(distances: Tensor, num_buckets: int, both_ways: bool) -> Tensor:
    """Bucket of each distance: one for each short distance, logarithmic ones up to 128, the last for all beyond.

    Both ways, the upper half of the buckets is for keys after the query; else those share the bucket of distance 0.
    The logarithm is taken in single precision, as where it meets a whole number the bucket depends on the rounding.
    """
    if both_ways:
        num_buckets //= 2
        first = (distances > 0) * num_buckets
        distances = distances.abs()
    else:
        first = torch.zeros_like(distances)
        distances = (-distances).clamp(min=0)
    num_exact = num_buckets // 2
    logarithms = torch.log(distances.clamp(min=1).float() / num_exact) / math.log(MAX_DISTANCE / num_exact)
    far = (num_exact + (logarithms * (num_buckets - num_exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(distances < num_exact, distances, far)


def attend(state: State, config: Config, name: str, queries_from: Tensor, keys_from: Tensor, bias: Tensor) -> Tensor:
    """Multi-head attention with an additive bias [.., heads or 1, queries or 1, keys]; scores are not scaled."""
    query, key, value = (
        linear(state, f"{name}.{part}", hidden).unflatten(-1, (config["num_heads"], -1)).transpose(1, 2)
        for part, hidden in (("q", queries_from), ("k", keys_from), ("v", keys_from))
    )
    weights = (query @ key.mT + bias).softmax(dim=-1)
    return linear(state, f"{name}.o", (weights @ value).transpose(1, 2).flatten(2))


def feed_forward(state: State, config: Config, name: str, inputs: Tensor) -> Tensor:
    """T5's feed-forward network with ReLU, or gated with the tanh approximation of GELU."""
    if _is_gated(config):
        gate = F.gelu(linear(state, f"{name}.wi_0", inputs), approximate="tanh")
        return linear(state, f"{name}.wo", gate * linear(state, f"{name}.wi_1", inputs))
    return linear(state, f"{name}.wo", linear(state, f"{name}.wi", inputs).relu())


def _is_gated(config: Config) -> bool:
    return config["feed_forward_proj"] == "gated-gelu"


# Adapters


def learned_adapter(state: State, name: str, inputs: Tensor) -> Tensor:
    """The encoder's adapter, one for all tasks: linear down, ReLU, linear up; no residual."""
    down = linear(state, f"{name}.adapter_down_manual", inputs).relu()
    return linear(state, f"{name}.adapter_up_manual", down)


def generated_adapter(state: State, config: Config, layer: int, prototypes: Tensor, inputs: Tensor) -> Tensor:
    """The adapter of a decoder layer, generated for each row from its prototype [B, 64], applied to [B, T, d]."""
    width, size = config["d_model"], config["decoder_adapter_dim"]
    network = "decoder.param_gen.decoder"
    layer_embedding = state["decoder.param_gen.layer_embed.weight"][layer].expand_as(prototypes)
    code = linear(state, f"{network}.linear1", torch.cat([prototypes, layer_embedding], dim=-1)).relu()
    code = F.layer_norm(
        linear(state, f"{network}.linear2", code),
        (PROTOTYPE_DIM,),
        state[f"{network}.LayerNorm.weight"],
        state[f"{network}.LayerNorm.bias"],
        eps=1e-6,
    )
    down_weight = linear(state, f"{network}.weight_down", code).reshape(-1, width, size)
    up_weight = linear(state, f"{network}.weight_up", code).reshape(-1, size, width)
    down = inputs @ down_weight + linear(state, f"{network}.bias_down", code)[:, None]
    return down.relu() @ up_weight + linear(state, f"{network}.bias_up", code)[:, None]


# Objective


def losses(
    state: State, logits: Tensor, instances: Tensor, batch: Mapping[str, Tensor], reduction: Literal["mean", "sum"]
) -> Terms:
    """The three terms of the objective for the results of `forward`."""
    prototypes = state["decoder.adapter_task_embedding.weight"]
    return Terms(
        sequence_loss(logits, batch["labels"], reduction),
        instance_loss(instances, batch["task_ids"]),
        prototype_loss(instances, prototypes, batch["task_ids"]),
    )


def sequence_loss(logits: Tensor, labels: Tensor, reduction: Literal["mean", "sum"]) -> Tensor:
    """Label-smoothed cross-entropy: 0 at padding, which the mean counts nevertheless."""
    log_probability = logits.log_softmax(dim=-1)
    nll = -log_probability.gather(-1, labels[..., None])[..., 0]
    smooth = -log_probability.sum(dim=-1)
    positions = (1 - LABEL_SMOOTHING) * nll + LABEL_SMOOTHING / logits.shape[-1] * smooth
    positions = positions.masked_fill(labels == PAD, 0.0)
    return positions.mean() if reduction == "mean" else positions.sum()


def instance_loss(instances: Tensor, task_ids: Tensor) -> Tensor:
    """Contrast of each row with all others, averaged over its positives, then over the rows that have one.

    The released code returns nan when no row has a positive; here that is 0.
    """
    normalised = instances / instances.norm(dim=-1, keepdim=True)
    scores = normalised @ normalised.T / TEMPERATURE
    rows = range(len(task_ids))
    losses = []
    for row in rows:
        others = [other for other in rows if other != row]
        positives = [other for other in others if task_ids[other] == task_ids[row]]
        if positives:
            losses.append((scores[row, others].logsumexp(dim=0) - scores[row, positives]).mean())
    return CONTRASTIVE_WEIGHT * torch.stack(losses).mean() if losses else instances.sum() * 0.0


def prototype_loss(instances: Tensor, prototypes: Tensor, task_ids: Tensor) -> Tensor:
    """Contrast of each row's own prototype with all the others, the own one left out of the denominator.

    The released code subtracts the own one from the full sum. That is minus infinity when there is one task only,
    which is 0 here, and in single precision also when the own prototype is near and all others are far.
    """
    if len(prototypes) == 1:
        return instances.sum() * 0.0
    normalised = instances / instances.norm(dim=-1, keepdim=True)
    scores = normalised @ (prototypes / prototypes.norm(dim=-1, keepdim=True)).T / TEMPERATURE
    losses = []
    for row, own in enumerate(task_ids.tolist()):
        others = [task for task in range(len(prototypes)) if task != own]
        losses.append(scores[row, others].logsumexp(dim=0) - scores[row, own])
    return CONTRASTIVE_WEIGHT * torch.stack(losses).mean()
