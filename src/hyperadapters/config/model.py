"""Settings of a model; they travel with its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from hyperadapters.config.validation import Float, Int, StrictModel

BackboneKind = Literal["encoder", "encoder-decoder", "decoder"]
"""Of a backbone: task heads answer for an encoder; the others write their answers."""
Dtype = Literal["float32", "bfloat16", "float16"]
Method = Literal["pha", "hyperformer", "hyperdecoder", "shared_adapter", "task_adapter"]


PRESETS = {"plus": {"codes": "orthogonal", "head_inputs": "pair_features", "label_names": True}}
"""Settings of a preset where they are not the defaults."""


class ModuleNames(StrictModel):
    """Where the parts of a backbone are whose architecture has no row in `hosts/sites.py`.

    Attributes:
        kind: "encoder", whose answers task heads give, or "decoder", a language model that goes on with its input.
        layers: path of the list of layers.
        feed_forward: path, inside a layer, of the module that maps its feed-forward's input [B, S, d] to the output.
        hidden_size: d; default: `hidden_size` of the backbone's config.
    """

    kind: Literal["encoder", "decoder"] = "encoder"
    layers: str = Field(min_length=1)
    feed_forward: str = Field(min_length=1)
    hidden_size: Int | None = Field(None, ge=1)


GENERATING: tuple[Method, ...] = ("pha", "hyperformer", "hyperdecoder")
"""Methods with a hypernetwork."""
RETRIEVING: tuple[Method, ...] = ("pha", "hyperdecoder")
"""Methods with a retriever."""


class ModelConfig(StrictModel):
    """Sizes of the method and the preset that fixes its arithmetic.

    Attributes:
        method: where the adapters come from: "pha", or one of the methods it is compared with (see docs/methods.md).
            Only "pha" routes, has contrastive losses, and adds tasks to a trained model.
        preset: "paper"; "official", which repeats the released code number by number (see docs/faithfulness.md); or
            "plus", which sets `codes`, `head_inputs` and `label_names` where they are not given (docs/plus.md).
            Default: "plus" for encoder backbones with method "pha", "paper" for all others.
        prototype_dim: p, numbers in a prototype, an instance vector, a layer embedding and a hypernetwork code.
        hidden_dim: hidden units of the retriever and of the hypernetwork's trunk.
        form: what is generated: "bottleneck", adapters parallel to each feed-forward (the paper), or "lora", low-rank
            changes of linear layers, which can be merged into the backbone and exported to PEFT.
        adapter_dim: bottleneck of the generated adapters of form "bottleneck".
        lora_rank: rank r of form "lora".
        lora_alpha: form "lora": what is added to a linear layer is multiplied by `lora_alpha / lora_rank`.
        target_modules: form "lora": the linear layers, by the ends of their paths in a layer, such as "q_proj";
            default: those that PEFT chooses for the architecture.
        modules: names of the backbone's modules, where its architecture is not a known one.
        shared_adapter_dim: bottleneck of the learned adapters in the encoder of an encoder-decoder; default:
            `adapter_dim`. Other backbones have none.
        adapter_norm_input: whether an adapter reads the layer-normed input of its feed-forward (T5 only).
        feature_layer: backbones of one stack only: m, the number of layers below the hidden states that the retriever
            reads; adapters are generated for the layers above. Default: half of the layers.
        frozen_encoder_layers: encoder-decoder backbones only: number of encoder layers, from below, without a learned
            adapter. What they compute never changes and can be kept between epochs; all of them: a frozen encoder.
        features: encoder backbones only: "layer", the retriever reads the hidden states at m, so that one pass routes
            and answers; or "backbone", it reads the last hidden states of the whole frozen pass, and the layers above m
            run once more with adapters.
        centroids_per_task: points by which the inputs of a task are recognised when routing. 1: its prototype. More,
            for tasks whose inputs form several clumps: so many centroids of its training instances, by k-means.
        temperature: of both contrastive losses.
        contrastive_weight: lambda, weight of each contrastive loss.
        contrast: which contrastive losses there are: "both", one of "instance" and "prototype", or "none". Without
            "prototype" nothing teaches the retriever where the prototypes are, so inputs cannot be routed well.
        codes: what the hypernetwork makes of a prototype and a site: "trunk", the published network, or "orthogonal",
            a rotation of the prototype for each site, so that tasks and sites start independent of each other.
        head_inputs: encoder backbones only: what the heads of trained tasks read: "adapted", the last hidden states;
            "texts", these and how the frozen backbone by itself sees the text, or each text of a pair, and how like
            they are; or "text", the same without the comparison of a pair.
        label_names: encoder backbones only: whether the name of a label counts as one more example of it, in
            classifications of single texts: for what is fitted to the inputs named by `head_inputs`, and for new tasks.
    """

    method: Method = "pha"
    preset: Literal["paper", "official", "plus"] | None = None
    prototype_dim: Int = Field(64, ge=1)
    hidden_dim: Int = Field(128, ge=1)
    form: Literal["bottleneck", "lora"] = "bottleneck"
    adapter_dim: Int = Field(64, ge=1)
    lora_rank: Int = Field(8, ge=1)
    lora_alpha: Float = Field(16.0, gt=0)
    target_modules: tuple[str, ...] | None = Field(None, min_length=1)
    modules: ModuleNames | None = None
    shared_adapter_dim: Int | None = Field(None, ge=1)
    adapter_norm_input: bool = True
    feature_layer: Int | None = Field(None, ge=0)
    frozen_encoder_layers: Int = Field(0, ge=0)
    features: Literal["layer", "backbone"] = "layer"
    centroids_per_task: Int = Field(1, ge=1)
    temperature: Float = Field(0.1, gt=0)
    contrastive_weight: Float = Field(0.1, ge=0)
    contrast: Literal["both", "instance", "prototype", "none"] = "both"
    codes: Literal["trunk", "orthogonal"] = "trunk"
    head_inputs: Literal["adapted", "text_features", "pair_features"] = "adapted"
    label_names: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**PRESETS.get(str(values.get("preset")), {}), **values}

    @property
    def lora_scale(self) -> float:
        """What a LoRA's output is multiplied by."""
        return self.lora_alpha / self.lora_rank

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.form == "lora" and self.preset == "official":
            raise ValueError("form: preset 'official' has the released code's bottleneck adapters; use 'paper'")
        others = {"bottleneck": ("lora_rank", "lora_alpha", "target_modules"), "lora": ("adapter_dim",)}[self.form]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: form '{self.form}' does not have it; remove it, or change the form")
        return self

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method != "pha" and self.preset == "official":
            raise ValueError(f"preset 'official' is the released code's PHA; with method '{self.method}' use 'paper'")
        if self.preset == "official" and self.codes != "trunk":
            raise ValueError(f"codes: preset 'official' has the released code's trunk, found '{self.codes}'; remove it")
        for name, reason in self.without_effect().items():
            raise ValueError(f"{name}: {reason}; remove it")
        return self

    def is_chosen(self, setting: str) -> bool:
        """Whether a setting has a value other than its default and the one that the preset gives it."""
        preset = PRESETS.get(str(self.preset), {})
        return getattr(self, setting) not in (type(self).model_fields[setting].default, preset.get(setting))

    def without_effect(self) -> dict[str, str]:
        """Settings that were chosen and change nothing, each with the reason."""
        return {
            effect.setting: effect.reason.format(method=self.method, form=self.form)
            for effect in EFFECTS
            if self.is_chosen(effect.setting) and not effect.is_there(self)
        }

    def for_backbone(self, has_heads: bool) -> ModelConfig:
        """These settings with the default preset, where none is given.

        Args:
            has_heads: whether it is an encoder, whose answers task heads give.
        """
        if self.preset is not None:
            return self
        preset = "plus" if has_heads and self.method == "pha" else "paper"
        return ModelConfig(**{**self.model_dump(exclude_unset=True), "preset": preset})


class Effect(NamedTuple):
    """When a setting has an effect, and what is said where it has none."""

    setting: str
    is_there: Callable[[ModelConfig], bool]
    reason: str


EFFECTS = (
    Effect("contrast", lambda config: config.method == "pha", "method '{method}' has no contrastive losses"),
    Effect(
        "contrastive_weight",
        lambda config: config.method == "pha" and config.contrast != "none",
        "there are no contrastive losses with this method and contrast",
    ),
    Effect(
        "temperature",
        lambda config: config.method == "pha",
        "method '{method}' has no contrastive losses and cannot route",
    ),
    Effect(
        "centroids_per_task",
        lambda config: config.method == "pha",
        "is for routing, and method '{method}' cannot route",
    ),
    Effect("codes", lambda config: config.method in GENERATING, "method '{method}' has no hypernetwork"),
    Effect("features", lambda config: config.method in RETRIEVING, "method '{method}' has no retriever"),
    Effect(
        "label_names",
        lambda config: config.method == "pha" or config.head_inputs != "adapted",
        "method '{method}' adds no tasks, and with head_inputs 'adapted' nothing else is fitted to the names",
    ),
    Effect(
        "adapter_norm_input", lambda config: config.form == "bottleneck", "form '{form}' has no adapters to norm for"
    ),
    Effect(
        "shared_adapter_dim",
        lambda config: config.form == "bottleneck",
        "form '{form}' has no bottleneck; lora_rank is the size of the shared ones too",
    ),
)
"""Settings that only some methods or forms have; those that depend on the backbone are in `hosts.placement`.

The sizes `prototype_dim` and `hidden_dim` are taken with every method, so that a comparison may change `method` alone.
"""


def drop_settings_without_effect(values: dict[str, Any]) -> dict[str, Any]:
    """The values of a stored `ModelConfig` without those that are refused now because they have no effect."""
    config = ModelConfig.model_construct(
        **{key: value for key, value in values.items() if key in ModelConfig.model_fields}
    )
    return {key: value for key, value in values.items() if key not in config.without_effect()}


class Lengths(StrictModel):
    """Where texts are cut.

    Attributes:
        input: tokens of an input.
        target: tokens of a target text; also the most that are generated.
    """

    input: Int = Field(128, ge=4)
    target: Int = Field(32, ge=2)
