"""Prototype-based HyperAdapter (Zhao, Fu and He, EMNLP 2023), assembled as in section 3 of the paper.

    h  pooled hidden states of an input           z = G(h)            instance vector, by the retriever
    k  prototype of a task                        t = argmax cos(z, k)  routing, where the task is not given
    e  embedding of a layer                       w = H([k_t ; e_l])  adapter of task t in layer l, by the hypernetwork

Training minimises the task loss plus lambda times the instance-contrastive and the prototype-contrastive loss.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyperadapters.config import ModelConfig
from hyperadapters.core import (
    AdapterTensor,
    AdapterWeights,
    InstanceRetriever,
    Processes,
    PrototypeTable,
    TaskDensities,
    instance_contrastive_loss,
    prototype_contrastive_loss,
)
from hyperadapters.methods.base import Assignment, Method, Route, make_hypernetwork, select_by_row


class PHA(Method):
    """The method of the paper: retriever, prototypes and hypernetwork.

    In addition to the paper, a task may have a scale of its generated adapter, or an adapter of its own that was fitted
    without the hypernetwork, routing centroids (see `core.PrototypeTable`), and a threshold below which an input routed
    to it is declined.

    Attributes:
        retriever: Module that maps pooled hidden states to instance vectors, z = G(h).
        prototypes: Prototypes k of the tasks.
        densities: Densities of the tasks' texts, by which inputs are routed once they are fitted; None if the setting
            `routing` is "prototypes".
        hypernetwork: Module that generates adapters from prototypes and layer embeddings, w = H([k ; e]).
        adapter_scales: Factors [T] of the outputs of the generated adapters. They may differ from 1 for tasks that are
            predicted better with weaker adapters or without (see `training.text_heads`) and for tasks that were added
            to a trained model; further training sets them to 1.
        own_adapters: Adapters that belong to one task each, by task id as a string.
        thresholds: Similarities [T] below which an input routed to a task is declined. Minus infinity means that
            no input is declined.
    """

    can_route = True
    can_change_tasks = True
    adapter_scales: Tensor
    thresholds: Tensor

    def __init__(
        self,
        config: ModelConfig,
        num_tasks: int,
        num_layers: int,
        hidden_size: int,
        tensors: Sequence[AdapterTensor],
    ) -> None:
        """Make the parts with fresh weights.

        Args:
            config: Settings with all defaults resolved.
            num_tasks: Number T of tasks.
            num_layers: Number L of layers with generated adapters.
            hidden_size: Size d of the backbone's hidden states.
            tensors: Tensors of an adapter in one layer.
        """
        super().__init__(config)
        self.retriever = InstanceRetriever(hidden_size, config.hidden_dim, config.prototype_dim)
        self.prototypes = PrototypeTable(num_tasks, config.prototype_dim, orthogonal=config.codes == "orthogonal")
        self.densities = None
        if config.routing == "densities":
            num_states = 2 if config.feature_layer or config.frozen_encoder_layers else 1
            self.densities = TaskDensities(num_tasks, num_states * hidden_size)
        self.hypernetwork = make_hypernetwork(config, num_layers, tensors)
        self.own_adapters = nn.ModuleDict()
        self.register_buffer("adapter_scales", torch.ones(num_tasks))
        self.register_buffer("thresholds", torch.full((num_tasks,), -torch.inf))

    def instance_vectors(self, features: Tensor) -> Tensor:
        """Compute z = G(h). The arguments and result are those of `Method.instance_vectors`."""
        instances: Tensor = self.retriever(features)
        return instances

    def similarity(self, instances: Tensor, features: Tensor | None = None, excluded: Tensor | None = None) -> Tensor:
        """Compute the similarity of inputs to each task.

        Args:
            instances: Instance vectors [B, p].
            features: Features that the densities read [B, n, d]. Default: the similarity to the prototypes is computed.
            excluded: Whether a task cannot be that of an input [B, T]. Default: every task can.

        Returns:
            Similarities [B, T] in float32: log-likelihood ratios of the densities if there are features and the
            densities are fitted, cosine similarities to the prototypes otherwise. Those to excluded tasks are minus
            infinity.
        """
        found: Tensor
        if features is not None and self.routes_by_densities:
            assert self.densities is not None
            found = self.densities(features)
        else:
            found = self.prototypes.similarity(instances)
        return found if excluded is None else found.masked_fill(excluded, -torch.inf)

    @property
    def routes_by_densities(self) -> bool:
        """Whether the task of an input is found by the densities of the tasks' texts, which have been fitted."""
        return self.densities is not None and self.densities.is_fitted

    def _select(
        self, task_ids: Tensor | None, instances: Tensor | None, route: Route, similarity: Tensor | None
    ) -> Assignment:
        if task_ids is not None:
            return self._of_tasks(task_ids)
        assert instances is not None
        similarity = self.similarity(instances) if similarity is None else similarity
        nearest = similarity.argmax(dim=-1)
        if route == "nearest":
            return self._of_tasks(nearest)
        mixtures = self.prototypes.mixture(instances, self.config.temperature)
        return select_by_row(nearest, self._of_each_task(self.hypernetwork(mixtures), nearest))

    def adapters(self, task_ids: Tensor) -> AdapterWeights:
        """Generate w = H([k ; e]) and scale its outputs, or return a task's own adapter if it has one.

        The arguments and result are those of `Method.adapters`.
        """
        return self._of_each_task(self.hypernetwork(self.prototypes(task_ids)), task_ids)

    def _of_each_task(self, weights: AdapterWeights, task_ids: Tensor) -> AdapterWeights:
        """Scale the generated weights [L, U, ...] of the tasks [U], or replace them by those of an own adapter."""
        weights = weights.scaled(self.adapter_scales[task_ids])
        if not len(self.own_adapters):
            return weights
        keys = [str(task_id) for task_id in task_ids.tolist()]
        if self.own_adapters.keys().isdisjoint(keys):
            return weights
        return AdapterWeights.cat(
            [self.own_adapters[key]() if key in self.own_adapters else weights.task(i) for i, key in enumerate(keys)]
        )

    def auxiliary_losses(
        self, instances: Tensor | None, task_ids: Tensor, processes: Processes
    ) -> tuple[Tensor, Tensor]:
        """Compute the contrastive losses of the paper that the setting `contrast` selects.

        The arguments and result are those of `Method.auxiliary_losses`.
        """
        assert instances is not None
        config, (instance, prototype) = self.config, super().auxiliary_losses(instances, task_ids, processes)
        if config.contrast in ("both", "instance"):
            of_all = instance_contrastive_loss(*processes.rows(instances, task_ids), config.temperature)
            instance = processes.function_of_rows(of_all)
        if config.contrast in ("both", "prototype"):
            of_own = prototype_contrastive_loss(
                instances,
                self.prototypes.weight,
                task_ids,
                config.temperature,
                positive_in_denominator=config.preset != "official",
            )
            prototype = processes.mean(of_own, len(task_ids))
        return instance, prototype
