"""The method in one sitting: pure torch, tensors in, tensors out.

Read in this order: `retriever` (hidden states to instance vectors), `prototypes` (one vector a task),
`hypernetwork` (prototype and site to adapter weights), `forms` (what these weights do), `losses` (what trains it).
`baselines` is what it is compared with and not part of it.
"""

from hyperadapters.core.baselines import LearnedAdapters
from hyperadapters.core.forms import BottleneckWeights, LearnedBottleneck, OwnBottleneck, bottleneck
from hyperadapters.core.grouping import Grouping
from hyperadapters.core.hypernetwork import Hypernetwork, OrthogonalHypernetwork, PrototypicalHypernetwork
from hyperadapters.core.losses import (
    Losses,
    Reduction,
    instance_contrastive_loss,
    prototype_contrastive_loss,
    sequence_loss,
    total_loss,
)
from hyperadapters.core.prototypes import PrototypeTable, cosine_similarity
from hyperadapters.core.retriever import InstanceRetriever, masked_mean

__all__ = [
    "BottleneckWeights",
    "Grouping",
    "Hypernetwork",
    "InstanceRetriever",
    "LearnedAdapters",
    "LearnedBottleneck",
    "Losses",
    "OrthogonalHypernetwork",
    "OwnBottleneck",
    "PrototypeTable",
    "PrototypicalHypernetwork",
    "Reduction",
    "bottleneck",
    "cosine_similarity",
    "instance_contrastive_loss",
    "masked_mean",
    "prototype_contrastive_loss",
    "sequence_loss",
    "total_loss",
]
