"""The method in one sitting: pure torch, tensors in, tensors out.

Read in this order: `retriever` (hidden states to instance vectors), `prototypes` (one vector a task),
`hypernetwork` (prototype and site to adapter weights), `forms` (what these weights do), `losses` (what trains it).
"""

from hyperadapters.core.forms import BottleneckWeights, LearnedBottleneck, bottleneck
from hyperadapters.core.hypernetwork import PrototypicalHypernetwork
from hyperadapters.core.losses import (
    Losses,
    Reduction,
    instance_contrastive_loss,
    prototype_contrastive_loss,
    sequence_loss,
    total_loss,
)
from hyperadapters.core.prototypes import PrototypeTable
from hyperadapters.core.retriever import InstanceRetriever, masked_mean

__all__ = [
    "BottleneckWeights",
    "InstanceRetriever",
    "LearnedBottleneck",
    "Losses",
    "PrototypeTable",
    "PrototypicalHypernetwork",
    "Reduction",
    "bottleneck",
    "instance_contrastive_loss",
    "masked_mean",
    "prototype_contrastive_loss",
    "sequence_loss",
    "total_loss",
]
