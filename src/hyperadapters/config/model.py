"""Settings of a model, which are stored in its checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from hyperadapters.config.validation import Float, Int, StrictModel, parse

BackboneKind = Literal["encoder", "encoder-decoder", "decoder"]
"""Kind of a backbone. Task heads read the hidden states of an encoder; the other kinds generate text."""
Dtype = Literal["float32", "bfloat16", "float16"]
Method = Literal["pha", "hyperformer", "hyperdecoder", "shared_adapter", "task_adapter"]


PRESETS = {
    "plus": {
        "common_adapter": True,
        "head_inputs": "adapted_texts",
        "label_names": True,
        "routing": "densities",
        "token_dropout": 0.3,
    }
}
"""For each preset, its settings that differ from the defaults."""


def _preset_values(preset: object) -> dict[str, Any]:
    return PRESETS.get(preset, {}) if isinstance(preset, str) else {}


class ModuleNames(StrictModel):
    """Names of the modules of a backbone whose architecture has no row in `backbones/architectures.py`.

    Attributes:
        kind: "encoder" (default) for a backbone with task heads, or "decoder" for a language model that continues its
            input.
        layers: Path of the list of layers in the backbone.
        feed_forward: Path in a layer of the module that computes the output of the feed-forward block from its input
            [B, S, d].
        hidden_size: Hidden size d. Default: `hidden_size` in the configuration of the backbone.
    """

    kind: Literal["encoder", "decoder"] = "encoder"
    layers: str = Field(min_length=1)
    feed_forward: str = Field(min_length=1)
    hidden_size: Int | None = Field(None, ge=1)


GENERATING: tuple[Method, ...] = ("pha", "hyperformer", "hyperdecoder")
"""Methods with a hypernetwork."""
RETRIEVING: tuple[Method, ...] = ("pha", "hyperdecoder")
"""Methods with a retriever."""
ROUTING: tuple[Method, ...] = ("pha",)
"""Methods with contrastive losses, which find the task of an input and can add tasks."""


class ModelConfig(StrictModel):
    """Settings of the method, with sizes, variants and the preset.

    Attributes:
        method: Source of the adapters: "pha" (default), or one of the methods that it is compared with (see
            docs/methods.md). Only "pha" routes, has contrastive losses, and adds tasks to a trained model.
        preset: "paper"; "official", which reproduces the arithmetic of the released code (see docs/faithfulness.md); or
            "plus", which changes the defaults of `common_adapter`, `head_inputs`, `label_names`, `routing` and
            `token_dropout` (see docs/plus.md). Default: "plus" for encoder backbones with method "pha", "paper"
            otherwise.
        prototype_dim: Size p of a prototype, an instance vector, a layer embedding and a code of the hypernetwork.
            Default: 64.
        hidden_dim: Number of hidden units of the retriever and of the hypernetwork's trunk. Default: 128.
        form: Form of the adapters: "bottleneck" (default) for adapters parallel to each feed-forward block, as in the
            paper, or "lora" for low-rank updates of linear layers, which can be merged into the backbone and exported
            to PEFT.
        adapter_dim: Size a of the bottleneck of generated adapters. For form "bottleneck". Default: 64.
        lora_rank: Rank r. For form "lora". Default: 8.
        lora_alpha: Numerator of the factor `lora_alpha / lora_rank` of the outputs. For form "lora". Default: 16.
        target_modules: Linear layers to adapt, as the ends of their paths in a layer, such as "q_proj". For form
            "lora". Default: those that PEFT chooses for the architecture.
        modules: Names of the modules of a backbone whose architecture is not in the table of architectures.
        shared_adapter_dim: Size of the bottleneck of the learned adapters in the encoder. For encoder-decoder
            backbones. Default: `adapter_dim`.
        adapter_norm_input: If True (default), an adapter reads the input of its feed-forward block after the layer
            norm, otherwise before it. For T5.
        feature_layer: Number m of layers below the hidden states that the retriever reads. Adapters are generated for
            the layers above. For encoder and decoder backbones. Default: half of the layers.
        frozen_encoder_layers: Number of encoder layers without a learned adapter, counted from the first layer. Their
            outputs never change and can be stored between epochs. For encoder-decoder backbones. Default: 0.
        features: Hidden states that the retriever reads: "layer" (default) for those of layer m, so that one pass
            routes and predicts, or "backbone" for the last hidden states of the frozen backbone, after which the layers
            above m run again with adapters. For encoder backbones.
        routing: What the task of an input is found by: "prototypes" (default) for the cosine similarity of its instance
            vector to the prototypes, as in the paper, or "densities" for the log-likelihood ratio of its frozen hidden
            states under densities of each task's texts and of short forms of them, which are fitted after training (see
            `core.TaskDensities`). The latter also recognises texts of other lengths and styles than the training rows.
        centroids_per_task: Number of vectors to which an input is compared for each task in routing. With 1 (default)
            it is compared to the prototype; with more, to so many k-means centroids of the instance vectors of the
            task's training rows, which suits tasks whose inputs form several clusters. For routing "prototypes".
        temperature: Temperature of both contrastive losses. Default: 0.1.
        contrastive_weight: Weight lambda of each contrastive loss. Default: 0.1.
        contrast: Contrastive losses to use: "both" (default), "instance", "prototype" or "none". Without "prototype"
            the retriever is not trained to place inputs near their prototypes, so that routing by prototypes is poor.
        codes: Computation of the codes of the hypernetwork: "trunk" (default) for the published network, or
            "orthogonal" for a rotation of the prototype in each layer, so that the codes of different tasks and layers
            are nearly orthogonal at first.
        common_adapter: If True, the weights that the hypernetwork generates for a task are added to those of an adapter
            that is learned for all tasks. Default: False.
        head_inputs: Inputs of the heads of trained tasks: "adapted" (default) for the mean of the last hidden states;
            "pair_features" for this and the features of the frozen backbone for each text, and a comparison of the two
            texts of a pair; "text_features" for the same without the comparison; or "adapted_texts" for the directions
            of the mean last hidden states of each text, and a comparison of the two texts of a pair, where each text
            passes through the adapted backbone as a sequence of its own. For encoder backbones.
        label_names: If True, the name of a label is an additional example of it in classification tasks with single
            texts, for the head weights that are fitted to features of the frozen backbone and for new tasks. For
            encoder backbones. Default: False.
        token_dropout: Probability with which a token is masked in training, for the layers above the frozen ones and
            for the heads. The first token of a sequence is always kept. For encoder backbones. Default: 0.
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
    routing: Literal["prototypes", "densities"] = "prototypes"
    centroids_per_task: Int = Field(1, ge=1)
    temperature: Float = Field(0.1, gt=0)
    contrastive_weight: Float = Field(0.1, ge=0)
    contrast: Literal["both", "instance", "prototype", "none"] = "both"
    codes: Literal["trunk", "orthogonal"] = "trunk"
    common_adapter: bool = False
    head_inputs: Literal["adapted", "text_features", "pair_features", "adapted_texts"] = "adapted"
    label_names: bool = False
    token_dropout: Float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {**_preset_values(values.get("preset")), **values}

    @property
    def separates_texts(self) -> bool:
        """Whether each text of a pair passes through the adapted backbone as a sequence of its own."""
        return self.head_inputs == "adapted_texts"

    @property
    def lora_scale(self) -> float:
        """Factor of the outputs of a LoRA."""
        return self.lora_alpha / self.lora_rank

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.form == "lora" and self.preset == "official":
            raise ValueError(
                "form: preset 'official' only has bottleneck adapters; use form 'bottleneck' or preset 'paper'"
            )
        others = {"bottleneck": ("lora_rank", "lora_alpha", "target_modules"), "lora": ("adapter_dim",)}[self.form]
        for name in others:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}: form '{self.form}' does not have this setting; remove it, or change the form"
                )
        return self

    @model_validator(mode="after")
    def _check_method(self) -> Self:
        if self.method != "pha" and self.preset == "official":
            raise ValueError(f"preset 'official' is only for method 'pha'; use preset 'paper' with '{self.method}'")
        if self.preset == "official" and self.codes != "trunk":
            raise ValueError(f"codes: preset 'official' only has 'trunk', found '{self.codes}'; remove it")
        if self.preset == "official" and self.common_adapter:
            raise ValueError("common_adapter: preset 'official' has no common adapter; remove it")
        for name, reason in self.without_effect().items():
            raise ValueError(f"{name}: {reason}; remove it")
        return self

    def is_chosen(self, setting: str) -> bool:
        """Return whether a setting has a value other than its default and the value of the preset.

        Args:
            setting: Name of the setting.
        """
        preset = _preset_values(self.preset)
        return getattr(self, setting) not in (type(self).model_fields[setting].default, preset.get(setting))

    def without_effect(self) -> dict[str, str]:
        """Return the settings that were chosen although they have no effect, each with the reason."""
        return {
            effect.setting: effect.reason.format(method=self.method, form=self.form)
            for effect in EFFECTS
            if self.is_chosen(effect.setting) and not effect.is_there(self)
        }

    def for_backbone(self, has_heads: bool) -> ModelConfig:
        """Return these settings with the default preset for a kind of backbone if no preset is given.

        Args:
            has_heads: Whether the backbone is an encoder, which has task heads.

        Raises:
            RecipeError: If a setting has no effect with the default preset.
        """
        if self.preset is not None:
            return self
        preset = "plus" if has_heads and self.method == "pha" else "paper"
        return parse(ModelConfig, {**self.model_dump(exclude_unset=True), "preset": preset})


class Effect(NamedTuple):
    """Condition under which a setting has an effect.

    Attributes:
        setting: Name of the setting.
        is_there: Function that returns whether the setting has an effect in a configuration.
        reason: Reason why it has none, for the error message.
    """

    setting: str
    is_there: Callable[[ModelConfig], bool]
    reason: str


EFFECTS = (
    Effect("contrast", lambda config: config.method in ROUTING, "method '{method}' has no contrastive losses"),
    Effect(
        "contrastive_weight",
        lambda config: config.method in ROUTING and config.contrast != "none",
        "there are no contrastive losses with this method and contrast",
    ),
    Effect(
        "temperature",
        lambda config: config.method in ROUTING,
        "method '{method}' has no contrastive losses and cannot route",
    ),
    Effect(
        "centroids_per_task",
        lambda config: config.method in ROUTING,
        "this setting is for routing, and method '{method}' cannot route",
    ),
    Effect(
        "centroids_per_task",
        lambda config: config.routing == "prototypes",
        "there are no centroids with routing 'densities'",
    ),
    Effect("routing", lambda config: config.method in ROUTING, "method '{method}' cannot route"),
    Effect("codes", lambda config: config.method in GENERATING, "method '{method}' has no hypernetwork"),
    Effect("common_adapter", lambda config: config.method in GENERATING, "method '{method}' has no hypernetwork"),
    Effect("features", lambda config: config.method in RETRIEVING, "method '{method}' has no retriever"),
    Effect(
        "label_names",
        lambda config: config.method in ROUTING or config.head_inputs != "adapted",
        "method '{method}' cannot add tasks, and no weights are fitted to label names with head_inputs 'adapted'",
    ),
    Effect(
        "adapter_norm_input", lambda config: config.form == "bottleneck", "form '{form}' has no bottleneck adapters"
    ),
    Effect(
        "shared_adapter_dim",
        lambda config: config.form == "bottleneck",
        "form '{form}' has no bottleneck; lora_rank is also the rank of shared adapters",
    ),
)
"""Settings that only have an effect with some methods or forms.

Settings that depend on the backbone are checked in `backbones.checks`. The sizes `prototype_dim` and `hidden_dim` are
accepted with every method, so that methods can be compared by changing `method` alone.
"""


def drop_settings_without_effect(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of a stored `ModelConfig` without settings that have no effect, which are refused now.

    Args:
        values: Values by the names of the settings.
    """
    config = ModelConfig.model_construct(
        **{key: value for key, value in values.items() if key in ModelConfig.model_fields}
    )
    return {key: value for key, value in values.items() if key not in config.without_effect()}


class Lengths(StrictModel):
    """Maximum lengths of texts; longer texts are truncated.

    Attributes:
        input: Maximum number of tokens of an input. Default: 128.
        target: Maximum number of tokens of a target text and of a generated text. Default: 32.
    """

    input: Int = Field(128, ge=4)
    target: Int = Field(32, ge=2)
