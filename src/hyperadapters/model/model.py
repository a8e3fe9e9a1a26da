"""HyperAdapterModel: a frozen backbone, and what gives it an adapter for each task."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from hyperadapters.backbones import checks
from hyperadapters.backbones.active import BatchState
from hyperadapters.backbones.architectures import LinearSize
from hyperadapters.backbones.devices import execution_device, is_offloaded
from hyperadapters.backbones.injection import parameter_name
from hyperadapters.backbones.loading import (
    absolute_name,
    fingerprint,
    is_quantised,
    load_backbone,
    load_tokenizer,
    num_embeddings,
)
from hyperadapters.backbones.passes import AdaptedLinear, FrozenOutput, Inputs, LowerOutput, pool
from hyperadapters.backbones.runners import make_runner
from hyperadapters.backbones.text_features import features_size
from hyperadapters.config import BackboneKind, Dtype, Lengths, ModelConfig, Task, parse
from hyperadapters.core import (
    AdapterWeights,
    Grouping,
    LearnedBottleneck,
    LearnedLora,
    Losses,
    Reduction,
    bottleneck_tensors,
    lora_tensors,
)
from hyperadapters.data.collate import Collator
from hyperadapters.errors import BackboneError, TaskError, unknown_name
from hyperadapters.heads.task_heads import TaskHeads
from hyperadapters.methods.base import MethodParts
from hyperadapters.methods.objective import objective
from hyperadapters.model.merging import Merged
from hyperadapters.model.output import Generated, HyperAdapterOutput, Route, check_labels, check_task_ids
from hyperadapters.model.tasks import set_task_parts, task_parts

if TYPE_CHECKING:
    from hyperadapters.fewshot.add_task import FitReport
    from hyperadapters.inference.routing import RoutingResult


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _exclusive(method: _Method) -> _Method:
    """Make a method hold the lock of its model."""

    @wraps(method)
    def locked(self: HyperAdapterModel, *args: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *args, **options)

    return cast(_Method, locked)


class HyperAdapterModel(MethodParts):
    """A frozen backbone with generated adapters, one task or many in a batch.

    Make one with `from_backbone`, load one with `from_pretrained`, or pass a transformers model to the constructor.
    The backbone is changed in place (frozen and wrapped); `detach` gives it back as it was.

    Attributes:
        backbone: the frozen model.
        tasks: the tasks, the index of each being its `task_id`.
        shared_adapters, heads: what is trained besides the parts of the method (see `MethodParts`).
        unused_adapters: of the preset "official" only: what the released code trains and never uses.
        lengths: at which texts are cut.
        hidden_size: d, of the backbone's hidden states.
        lock: held while the model is run or changed, and to be held by whoever does several such things that belong
            together. Several threads may share a model: they take turns.
        revision: counts the changes of the tasks; what was derived from them before is outdated.
        folder: where its checkpoint was written last, or else read; not of one from the Hub.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tasks: Sequence[Task],
        config: ModelConfig | None = None,
        backbone_name: str | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        """Put adapters into a backbone.

        Args:
            backbone: a transformers model of a known architecture; for encoders the plain one, without a task head.
            tasks: at least one; their order fixes the task ids.
            config: method, sizes and preset.
            backbone_name: under which a checkpoint finds the backbone again; default: the backbone's `name_or_path`.
            lengths: at which texts are cut; default: 128 tokens of input, or what the backbone has positions for.

        Raises:
            BackboneError: unknown architecture, or a module is missing. Nothing has been changed then.
            TaskError: no task, two of one name, a text-to-text task for a backbone with heads, or labels not known.
            RecipeError: a setting does not fit the backbone.
        """
        plan = checks.plan(backbone, tasks, config, lengths)
        config, architecture, hidden_size = plan.config, plan.architecture, plan.architecture.hidden_size
        tensors = bottleneck_tensors(hidden_size, config.adapter_dim)
        if config.form == "lora":
            tensors = lora_tensors(_by_parameter(plan.linears.generated), config.lora_rank)
        super().__init__(config, len(tasks), plan.num_layers, hidden_size, tensors)
        self.tasks, self.lengths, self.hidden_size = plan.tasks, plan.lengths, hidden_size
        self._architecture = architecture
        name = backbone_name or str(getattr(backbone, "name_or_path", ""))
        self.backbone_name = absolute_name(name) if name else None
        self.backbone_fingerprint = fingerprint(backbone)
        self.backbone_fingerprint_float16 = fingerprint(backbone, torch.float16)
        self.lock = threading.RLock()
        self.revision = 0
        self.renamed: dict[str, str] = {}
        self.folder: Path | None = None

        shared_dim = config.shared_adapter_dim or config.adapter_dim
        self.shared_adapters = nn.ModuleList(
            LearnedBottleneck(hidden_size, shared_dim)
            if config.form == "bottleneck"
            else LearnedLora(_by_parameter(plan.linears.shared), config.lora_rank)
            for _ in range(plan.num_shared)
        )
        self.unused_adapters = nn.ModuleList()
        if config.preset == "official":
            # The released code allocates, counts, saves and never uses them; its checkpoints hold them.
            self.unused_adapters.extend(
                LearnedBottleneck(hidden_size, config.adapter_dim) for _ in range(plan.num_layers)
            )
        self.text_to_text = architecture.kind != "encoder"
        self.heads = None if self.text_to_text else _heads(hidden_size, self.tasks, config)
        self._reads_features: tuple[int, bool] | None = None
        self._merged: Merged | None = None
        self._is_compiled = False

        self.backbone = backbone
        self._passes = make_runner(backbone, architecture, config, plan.linears, self.shared_adapters)
        self.to(plan.device)

    @classmethod
    def from_backbone(
        cls,
        name: str,
        tasks: Sequence[Task],
        preset: str | None = None,
        dtype: Dtype | None = None,
        **settings: Any,
    ) -> HyperAdapterModel:
        """Load a backbone and make a model with fresh adapters.

        Args:
            name: on the Hub, or a folder.
            tasks: see the constructor.
            preset: see `ModelConfig`.
            dtype: of the backbone's weights; default: that of its files. What is trained is in float32.
            **settings: other settings of `ModelConfig`.

        Raises:
            BackboneError, TaskError, RecipeError: see the constructor.
        """
        config = parse(ModelConfig, {"preset": preset, **settings})
        return cls(load_backbone(name, config.modules, dtype), tasks, config, backbone_name=name)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        backbone: nn.Module | None = None,
        revision: str | None = None,
        token: str | None = None,
        dtype: Dtype | None = None,
    ) -> HyperAdapterModel:
        """Load a checkpoint, and its backbone unless one is given.

        Args:
            name_or_folder: a folder; or a name on the Hub, like "user/name", if there is no folder of that name.
            backbone: to load it into.
            revision: of a name on the Hub: branch, tag or commit.
            token: for the Hub; default: that of `hf auth login`.
            dtype: of the weights of a backbone that is loaded; default: that of its files.

        Raises:
            CheckpointError: it is missing, damaged, of a newer format, or of another backbone; or the Hub does not give
                it.
        """
        from hyperadapters.checkpoints.format import load_model
        from hyperadapters.checkpoints.hub import find_checkpoint

        folder = find_checkpoint(name_or_folder, revision, token)
        model = load_model(folder, backbone, dtype)
        model.folder = folder if folder == Path(name_or_folder) else None
        return model

    @_exclusive
    def save_pretrained(
        self,
        folder: str | Path,
        license: str | None = None,
        scores: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    ) -> None:
        """Write a checkpoint, everything trained and the tasks, nothing of the backbone; and its model card, README.md.

        A README.md that the library did not write, or that was changed since, stays as it is.

        Args:
            folder: to write it to.
            license: of the card, as the Hub names it, for example "apache-2.0"; default: that of the card before.
            scores: of the card, by task, split and metric; default: those of the folder's `metrics.json`.

        Raises:
            OutputError: the folder cannot be written.
        """
        from hyperadapters.checkpoints.card import read_scores, write_card
        from hyperadapters.checkpoints.format import save_model

        path = Path(folder)
        save_model(self, path)
        self.folder = path
        write_card(self, path, str(folder), license, read_scores(path) if scores is None else scores)

    @_exclusive
    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        license: str | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload a checkpoint with its model card to the Hugging Face Hub, in one commit that replaces the one there.

        The card has the scores of the `metrics.json` in the model's `folder`. A README.md that somebody wrote or
        changed goes before it: the one in `folder`, or else the one on the Hub.

        Args:
            repo_id: like "user/name"; made if it is not there.
            private: whether a new one is private; default: as the owner's other ones.
            token: default: that of `hf auth login`.
            license: see `save_pretrained`.
            commit_message: of the commit.
            revision: branch to commit to; default: main.
            create_pr: whether to propose the commit as a pull request.

        Returns:
            The address of the commit.

        Raises:
            OutputError: the Hub cannot be reached, or does not take it.
        """
        from hyperadapters.checkpoints.hub import push

        return push(self, repo_id, private, token, license, commit_message, revision, create_pr)

    def refresh_fingerprint(self) -> bool:
        """Compute the fingerprints of the backbone anew if its weights have changed, and return whether they have.

        Another floating point type is not a change, and neither is a merged task or quantisation with torchao.
        """
        if self._merged is not None or is_quantised(self.backbone):
            return False
        found = fingerprint(self.backbone), fingerprint(self.backbone, torch.float16)
        if found[0] == self.backbone_fingerprint or found[1] == self.backbone_fingerprint_float16:
            return False
        self.backbone_fingerprint, self.backbone_fingerprint_float16 = found
        return True

    @property
    def kind(self) -> BackboneKind:
        """Of the backbone: "encoder", "encoder-decoder" or "decoder"."""
        return self._architecture.kind

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest row that passes through the first stack: of an input, of a decoder with its answer."""
        return self.lengths.input + (self.lengths.target if self.kind == "decoder" else 0)

    @cached_property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, loaded on first access; it can be changed, or another one be set.

        A checkpoint holds it if it is not the one that the backbone's name leads to.

        Raises:
            BackboneError: it cannot be loaded, or the backbone has no name to load it by.
        """
        if self.backbone_name is None:
            raise BackboneError(
                "the backbone was given in memory and has no name to find a tokenizer by; set model.tokenizer"
            )
        return load_tokenizer(self.backbone_name)

    @property
    def has_tokenizer(self) -> bool:
        """Whether a tokenizer was set, or the backbone has a name to load one by."""
        return self.backbone_name is not None or "tokenizer" in vars(self)

    @property
    def collator(self) -> Collator:
        """Makes batches for this model, with its present tasks."""
        return self.collator_of(self.tasks)

    def collator_of(self, tasks: Sequence[Task]) -> Collator:
        """Makes batches for this model, with other tasks than its own."""
        limit = num_embeddings(self.backbone)
        return Collator(self.tokenizer, tasks, self.kind, self.lengths.input, self.lengths.target, limit)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled and copied: everything but the lock, which belongs to this object."""
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock = threading.RLock()

    # Forward

    @_exclusive
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        labels: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: Reduction = "mean",
        output_hidden_states: bool = False,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        frozen: FrozenOutput | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> HyperAdapterOutput:
        """Run a batch of one task or of several.

        Args:
            input_ids: [B, S].
            attention_mask: 1 for real tokens [B, S]; default: all real.
            task_ids: task of each row [B]; default: the most similar one, if the method can route.
            labels: label index or number [B] (heads); token ids [B, T] with -100 for padding (encoder-decoder); or as
                transformers has them for language models, token ids [B, S] of the input with its answer, -100 wherever
                there is no answer (decoder).
            token_type_ids: [B, S], for encoders that have them.
            decoder_input_ids: [B, T], of an encoder-decoder; default: the labels moved right.
            label_smoothing, reduction: of the task loss.
            output_hidden_states: whether to return the backbone's hidden states.
            route: the adapters of rows without `task_ids`: "nearest" for those of the most similar task, "soft" for
                those generated from a mixture of the prototypes, weighted by similarity. The head, and an adapter
                that a task has of its own, are the most similar task's in any case.
            lower_output, frozen: result of the method of that name for the same inputs, where it is there already.
            prompt_mask: of a decoder: 1 for the tokens of the input without the answer [B, S], which the retriever
                reads; default: those before the first label, or all.
            sequence_ids: of an encoder whose heads read the texts of pairs by themselves: 0 for tokens of the first
                text, 1 for those of the second, -1 for special tokens and padding [B, S], as `collator` makes them;
                default: told by `token_type_ids`, where the second texts have type 1.

        Raises:
            TaskError: `task_ids` has a wrong shape or type or is out of range, or is missing where there are labels or
                the method cannot route; or a head reads the texts of pairs, and nothing tells these apart.
        """
        if prompt_mask is None and labels is not None and self.kind == "decoder":
            prompt_mask = _before_labels(input_ids, labels)
        inputs = self._inputs(input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        self._check_task_ids(task_ids, len(input_ids), labels is not None)
        if labels is not None:
            check_labels(labels, len(input_ids), self.text_to_text)
        if decoder_input_ids is None:
            decoder_input_ids = self._passes.default_decoder_input_ids(labels)
        features, instances = torch.empty(0), None

        def choose(pooled: Tensor) -> BatchState:
            nonlocal features, instances, task_ids
            features, instances = pooled, self.retrieve(pooled)
            task_ids, state = self.choose(task_ids, instances, route)
            return state

        output, lower_output = self._passes.run_batch(
            inputs, choose, decoder_input_ids, output_hidden_states, lower_output, frozen
        )
        assert task_ids is not None
        if self.heads is None:
            logits = output.logits
        else:
            known = None if lower_output is None else lower_output.head_features
            features = self._features_of(inputs, features, task_ids) if known is None else known
            logits = self.heads(pool(output, inputs), features, task_ids)
        losses = None
        if labels is not None:
            losses = objective(self, logits, instances, task_ids, labels, label_smoothing, reduction)
        own_states = getattr(output, "hidden_states", None)
        return HyperAdapterOutput(
            loss=None if losses is None else losses.total,
            losses=losses,
            logits=logits,
            instances=instances,
            task_ids=task_ids,
            encoder_hidden_states=own_states if self.heads else lower_output.hidden_states if lower_output else None,
            decoder_hidden_states=getattr(output, "decoder_hidden_states", None if self.heads else own_states),
        )

    def training_loss(
        self, batch: Mapping[str, Tensor], reduction: Reduction = "mean", label_smoothing: float = 0.1
    ) -> Losses:
        """The objective for a batch: the total, the task loss and both contrastive terms.

        Args:
            batch: arguments of `forward`, with `task_ids` and `labels`.
            reduction: of the task loss: "mean" or "sum" over target tokens or rows.
            label_smoothing: of the task loss.
        """
        losses: Losses = self(**batch, reduction=reduction, label_smoothing=label_smoothing).losses
        return losses

    @_exclusive
    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        **options: Any,
    ) -> Any:
        """Generate with the backbone's `generate`, each row with its task's adapters.

        The layers that give the features, the retriever and the hypernetwork read the input once, whatever the length
        of the answer and the number of beams. Inputs of a decoder may be padded on either side; the result begins with
        the inputs, padded on the left, as transformers has it.

        Args:
            input_ids, attention_mask, task_ids, route, lower_output: as in `forward`.
            **options: of transformers' `generate`.

        Raises:
            TaskError: see `forward`, or the backbone has heads and generates nothing.
        """
        return self.generate_with_tasks(input_ids, attention_mask, task_ids, route, lower_output, **options).tokens

    @_exclusive
    @torch.no_grad()
    def generate_with_tasks(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
        route: Route = "nearest",
        lower_output: LowerOutput | None = None,
        **options: Any,
    ) -> Generated:
        """As `generate`, which has the arguments and errors; also returns the tasks and the instance vectors."""
        if not self.text_to_text:
            raise TaskError("generate needs a backbone that writes its answers; this one has task heads: use forward")
        inputs = self._inputs(input_ids, attention_mask)
        self._check_task_ids(task_ids, len(input_ids), False)
        instances = None

        def choose(pooled: Tensor) -> BatchState:
            nonlocal instances, task_ids
            instances = self.retrieve(pooled)
            task_ids, state = self.choose(task_ids, instances, route)
            return state

        tokens = self._passes.generate(inputs, choose, lower_output, options)
        assert task_ids is not None
        return Generated(tokens, task_ids, instances)

    @_exclusive
    def forward_lower_layers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        frozen: FrozenOutput | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> LowerOutput:
        """Run what lies below the generated adapters and is the same for every task; arguments as in `forward`."""
        return self._passes.forward_lower_layers(
            self._inputs(input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids), frozen=frozen
        )

    @property
    def has_frozen_layers(self) -> bool:
        """Whether there are layers below everything trained, so that `frozen` can be kept through a training."""
        return self._passes.has_frozen_layers

    @_exclusive
    def forward_frozen_layers(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> FrozenOutput:
        """Run the layers below everything that is trained; arguments as in `forward`."""
        return self._passes.forward_frozen_layers(
            self._inputs(input_ids, attention_mask, token_type_ids, prompt_mask, sequence_ids)
        )

    def instances(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> Tensor:
        """Instance vectors [B, p].

        Raises:
            TaskError: the method has no retriever.
        """
        vectors = self.retrieve(
            self.forward_lower_layers(input_ids, attention_mask, token_type_ids, sequence_ids=sequence_ids).pooled
        )
        if vectors is None:
            raise TaskError(f"method '{self.adapter_config.method}' has no instance vectors")
        return vectors

    @_exclusive
    def head_features(self, inputs: Inputs, pooled: Tensor, is_pair: Sequence[bool] | bool) -> Tensor:
        """What wide heads read of inputs besides the adapted hidden states [B, F]; no adapter changes it.

        Args:
            inputs: arguments of `encode`.
            pooled: what the retriever reads of them [B, d]; read with `head_inputs: adapted` only.
            is_pair: which rows are pairs of texts; or whether all are, which makes the function exportable.
        """
        head_inputs = self.adapter_config.head_inputs
        if head_inputs == "adapted":
            return pooled
        pairs = is_pair if isinstance(is_pair, bool) else torch.tensor(is_pair, device=inputs["input_ids"].device)
        return self._passes.text_features(self._inputs(**inputs), pairs, head_inputs == "pair_features")

    def _features_of(self, inputs: Inputs, pooled: Tensor, task_ids: Tensor) -> Tensor:
        """As `head_features`, but zeros where no head of the model has learned to read them yet."""
        assert self.heads is not None
        if self.adapter_config.head_inputs == "adapted":
            return pooled
        if self._reads_features is None or self._reads_features[0] != self.revision:
            self._reads_features = self.revision, self.heads.reads_features
        if not self._reads_features[1]:
            return pooled.new_zeros(len(pooled), self.heads.features_size)
        return self.head_features(inputs, pooled, [self.tasks[task_id].is_pair for task_id in task_ids.tolist()])

    @_exclusive
    def forward_upper_layers(
        self,
        inputs: Inputs,
        lower_output: LowerOutput,
        weights: AdapterWeights,
        decoder_input_ids: Tensor | None = None,
    ) -> Tensor:
        """Run the layers above `encode` with the same given adapter for every row.

        Args:
            inputs: arguments of `encode`.
            lower_output: its result.
            weights: of one task [L, 1, ...].
            decoder_input_ids: [B, T], for text-to-text backbones.

        Returns:
            Pooled last hidden states [B, d], or logits of a text-to-text backbone, as `forward` has them.
        """
        inputs = self._inputs(**inputs)
        output = self._passes.run_upper_layers(inputs, lower_output, _for_all_rows(weights, inputs), decoder_input_ids)
        values: Tensor = output.logits if self.text_to_text else pool(output, inputs)
        return values

    @_exclusive
    def forward_with_adapter(self, inputs: Inputs, weights: AdapterWeights) -> tuple[Tensor, Tensor]:
        """`encode` and `adapted` of an encoder at once, as `forward` runs them; torch can export it.

        Args:
            inputs: arguments of `encode`.
            weights: of one task [L, 1, ...].

        Returns:
            Pooled last hidden states [B, d], and what the retriever reads [B, d].
        """
        inputs = self._inputs(**inputs)
        state, read = _for_all_rows(weights, inputs), []

        def choose(pooled: Tensor) -> BatchState:
            read.append(pooled)
            return state

        output, _ = self._passes.run_batch(inputs, choose)
        return pool(output, inputs), read[0]

    def route(self, texts: Iterable[Any], **options: Any) -> list[RoutingResult]:
        """Find the task of each text; see `inference.routing.route`, which names the options."""
        from hyperadapters.inference.routing import route

        return route(self, texts, **options)

    def _inputs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        sequence_ids: Tensor | None = None,
    ) -> dict[str, Tensor]:
        inputs = {"input_ids": input_ids}
        inputs["attention_mask"] = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if token_type_ids is not None and not self.text_to_text:
            inputs["token_type_ids"] = token_type_ids
        if prompt_mask is not None:
            inputs["prompt_mask"] = prompt_mask * inputs["attention_mask"]
        if sequence_ids is not None and not self.text_to_text:
            if sequence_ids.shape != input_ids.shape:
                raise TaskError(
                    f"sequence_ids: expected the shape {tuple(input_ids.shape)} of input_ids, found "
                    f"{tuple(sequence_ids.shape)}"
                )
            inputs["sequence_ids"] = sequence_ids
        return inputs

    def _check_task_ids(self, task_ids: Tensor | None, rows: int, has_labels: bool) -> None:
        check_task_ids(task_ids, rows, len(self.tasks), has_labels, self.adapter_config.method)
        if self._merged is not None and (task_ids is None or bool((task_ids != self._merged.task_id).any())):
            raise TaskError(
                f"task '{self.tasks[self._merged.task_id].name}' is merged into the backbone, which answers for no "
                "other one: give its task id for every row, or call unmerge()"
            )

    # Form "lora"

    @_exclusive
    def merge(self, task: str) -> None:
        """Fold the LoRA of one task into the backbone's weights; until `unmerge` the model answers for it alone.

        The backbone is then the task's model, without anything beside it: `detach` gives it away as it is. The model
        is put into evaluation mode.

        Raises:
            TaskError: there is no such task, or it cannot be merged (see `merging.Merged`), or one is merged.
            BackboneError: a weight is quantised, or also used elsewhere in the backbone.
        """
        self._check_not_merged()
        self._merged = Merged(self.eval(), task)
        self._passes.set_merged(True)

    @_exclusive
    def unmerge(self) -> None:
        """Put the backbone's weights back bit for bit.

        Raises:
            TaskError: no task is merged.
        """
        if self._merged is None:
            raise TaskError("no task is merged")
        self._merged.undo()
        self._merged = None
        self._passes.set_merged(False)

    def adapted_linears(self) -> list[AdaptedLinear]:
        """The linear layers of the backbone that form "lora" changes; none of another form."""
        return self._passes.adapted_linears()

    def _check_not_merged(self) -> None:
        if self._merged is not None:
            raise TaskError(f"task '{self.tasks[self._merged.task_id].name}' is merged: call unmerge() first")

    # Tasks

    def task_id(self, name: str) -> int:
        """The id of a task.

        Raises:
            TaskError: there is none of this name.
        """
        names = [task.name for task in self.tasks]
        if name not in names:
            raise TaskError(unknown_name("task", name, names))
        return names.index(name)

    @_exclusive
    def add_task(self, task: Task, examples: Iterable[Any], **options: Any) -> FitReport:
        """Add a task from a handful of examples; see `training.fewshot.add_task`, which names the options."""
        from hyperadapters.fewshot.add_task import add_task

        return add_task(self, task, examples, **options)

    @_exclusive
    def refit_task(self, name: str, examples: Iterable[Any], **options: Any) -> FitReport:
        """Fit a task anew from examples; see `training.fewshot.refit_task`, which names the options."""
        from hyperadapters.fewshot.add_task import refit_task

        return refit_task(self, name, examples, **options)

    @_exclusive
    def remove_task(self, name: str) -> None:
        """Remove a task. The ids of those behind it move up by one; their outputs stay as they are.

        Raises:
            TaskError: it is unknown, or the last one, or the method's tasks cannot change.
        """
        self.check_tasks_can_change()
        task_id = self.task_id(name)
        if len(self.tasks) == 1:
            raise TaskError(f"'{name}' is the only task, and a model needs one: add another before removing it")
        parts = task_parts(self)
        del parts[task_id]
        set_task_parts(self, parts)

    @_exclusive
    def rename_task(self, name: str, new_name: str) -> None:
        """Give a task another name, and keep the one that it was trained under in `renamed`; nothing else changes.

        Raises:
            TaskError: it is unknown, or the new name is taken or not a valid one.
        """
        task_id = self.task_id(name)
        renamed = parse(Task, {**self.tasks[task_id].model_dump(), "name": new_name}, TaskError)
        tasks = (*self.tasks[:task_id], renamed, *self.tasks[task_id + 1 :])
        self.check_tasks(tasks)
        self.tasks = tasks
        if (trained_name := self.renamed.pop(name, name)) != new_name:
            self.renamed[new_name] = trained_name
        self.revision += 1

    def check_tasks(self, tasks: Sequence[Task]) -> None:
        """Raise TaskError unless this model can have these tasks."""
        self._check_not_merged()
        checks.check_tasks(tasks, self._architecture)

    # Parameters and state

    def adapter_state_dict(self) -> dict[str, Tensor]:
        """All parameters and buffers but the backbone's, by name."""
        return {name: value for name, value in self.state_dict().items() if not name.startswith("backbone.")}

    @_exclusive
    def load_adapter_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Set all parameters and buffers but the backbone's.

        Raises:
            KeyError: a name is missing or unknown.
            ValueError: a tensor has another shape.
        """
        own = self.adapter_state_dict()
        if own.keys() != state.keys():
            raise KeyError(f"expected and found names differ in {sorted(own.keys() ^ state.keys())}")
        for name, value in state.items():
            if own[name].shape != value.shape:
                raise ValueError(f"'{name}': expected shape {tuple(own[name].shape)}, found {tuple(value.shape)}")
        with torch.no_grad():
            for name, value in state.items():
                own[name].copy_(value)
        self.revision += 1

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model, for `to`, `half`, `double` and the like.

        What is trained is never held in less than float32, which small steps of an optimizer would not change.

        Raises:
            BackboneError: weights of the backbone are offloaded by accelerate, and it would have to be moved.
        """
        backbone = self._modules.pop("backbone")
        assert backbone is not None
        try:
            super()._apply(partial(_at_least_float32, fn), recurse)
        finally:
            self._modules["backbone"] = backbone
        if not is_offloaded(backbone):
            backbone._apply(fn, recurse)
            return self
        probe = torch.empty(0, device=execution_device(backbone), dtype=next(backbone.parameters()).dtype)
        if (fn(probe).device, fn(probe).dtype) != (probe.device, probe.dtype):
            raise BackboneError(
                "the backbone cannot be moved or converted, since accelerate has offloaded weights of it; load it anew "
                "with another device_map or dtype"
            )
        return self

    def num_trainable_parameters(self) -> int:
        """Number of parameters that training changes."""
        return sum(parameter.numel() for parameter in self.parameters() if parameter.requires_grad)

    def train(self, mode: bool = True) -> Self:
        """Switch between training and evaluation mode; layers below the features stay in evaluation mode.

        Their outputs do not depend on anything trained, so there is nothing for dropout to regularise.

        Raises:
            TaskError: to be trained, while a task is merged.
        """
        if mode:
            self._check_not_merged()
        super().train(mode)
        self._passes.keep_frozen_in_evaluation()
        return self

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """Switch on gradient checkpointing of the backbone's layers, keeping the batch's tasks for recomputation.

        Called by `transformers.Trainer`. Checkpointing is always the non-reentrant kind.
        """
        self._passes.enable_checkpointing(activation_checkpointing_kwargs or {}, options)

    def compile(self, *args: Any, **options: Any) -> None:
        """Compile the layers of the backbone, one by one, with the arguments of `torch.compile`.

        A change of the task compiles nothing anew. What chooses the tasks of a batch is not compiled: its result
        decides what is computed.
        """
        self._is_compiled = True
        for layer in self._layers():
            layer.compile(*args, **options)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """A context in which `model.backbone(...)` gives the bare backbone's outputs.

        Raises:
            TaskError: a task is merged into the backbone.
        """
        self._check_not_merged()
        return self._passes.disabled()

    @_exclusive
    def detach(self) -> nn.Module:
        """Take all adapters out and return the backbone exactly as it was; a merged task stays in its weights.

        The model cannot be used afterwards.
        """
        if self._is_compiled:
            for layer in self._layers():
                layer._compiled_call_impl = None
        return self._passes.detach()

    def _layers(self) -> list[nn.Module]:
        stacks = (self._architecture.generated, self._architecture.shared)
        return [layer for stack in stacks if stack is not None for layer in stack.layers]


def _at_least_float32(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """Apply a conversion to a tensor, to float32 where it would be to a shorter floating point type."""
    converted = fn(tensor)
    if not tensor.is_floating_point() or converted.dtype == tensor.dtype:
        return converted
    return tensor.to(converted.device, torch.promote_types(converted.dtype, torch.float32))


def _before_labels(input_ids: Tensor, labels: Tensor) -> Tensor:
    """1 for the tokens before the first label of a row [B, S].

    Raises:
        TaskError: there is not a label, or -100, for each token of the input.
    """
    if labels.shape != input_ids.shape:
        raise TaskError(
            f"labels: expected the shape {tuple(input_ids.shape)} of input_ids, which hold input and answer of a "
            f"language model, with -100 for what is no answer; found {tuple(labels.shape)}"
        )
    return ((labels != -100).cumsum(dim=1) == 0).long()


def _by_parameter(linears: Mapping[str, LinearSize]) -> dict[str, LinearSize]:
    return {parameter_name(path): size for path, size in linears.items()}


def _for_all_rows(weights: AdapterWeights, inputs: Inputs) -> BatchState:
    """The state of a batch whose rows all have the one adapter [L, 1, ...] of `weights`."""
    rows = inputs["input_ids"]
    return BatchState(weights, Grouping.of(rows.new_zeros(rows.shape[0]), 1))


def _heads(hidden_size: int, tasks: Sequence[Task], config: ModelConfig) -> TaskHeads:
    if config.head_inputs == "adapted":
        return TaskHeads(hidden_size, tasks)
    return TaskHeads(
        hidden_size, tasks, [True] * len(tasks), features_size(hidden_size, config.head_inputs == "pair_features")
    )
