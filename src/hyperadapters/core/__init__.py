"""The method in pure PyTorch: every function and module takes tensors and returns tensors.

Read the modules in this order: `retriever` (hidden states to instance vectors), `prototypes` (one vector per task),
`hypernetwork` (prototype and layer to adapter weights), `forms` (the functions that these weights parameterise),
`losses` (the training objective), `processes` (the same for a batch that several processes share), `densities` (the
texts of each task, for routing).
"""

from hyperadapters.core.densities import TaskDensities
from hyperadapters.core.forms import (
    AdapterTensor,
    AdapterWeights,
    LearnedBottleneck,
    LearnedLora,
    OwnAdapter,
    bottleneck,
    bottleneck_tensors,
    lora,
    lora_tensors,
)
from hyperadapters.core.grouping import Grouping
from hyperadapters.core.hypernetwork import Hypernetwork, OrthogonalHypernetwork, PrototypicalHypernetwork
from hyperadapters.core.losses import (
    Losses,
    Reduction,
    TaskLoss,
    instance_contrastive_loss,
    prototype_contrastive_loss,
    sequence_loss,
    total_loss,
)
from hyperadapters.core.processes import ONE_PROCESS, DataParallelProcesses, MicroBatches, Processes
from hyperadapters.core.prototypes import PrototypeTable, cosine_similarity, most_similar
from hyperadapters.core.retriever import InstanceRetriever, masked_mean

__all__ = [
    "ONE_PROCESS",
    "AdapterTensor",
    "AdapterWeights",
    "DataParallelProcesses",
    "MicroBatches",
    "Grouping",
    "Hypernetwork",
    "InstanceRetriever",
    "LearnedBottleneck",
    "LearnedLora",
    "Losses",
    "OrthogonalHypernetwork",
    "OwnAdapter",
    "Processes",
    "PrototypeTable",
    "PrototypicalHypernetwork",
    "Reduction",
    "TaskDensities",
    "TaskLoss",
    "bottleneck",
    "bottleneck_tensors",
    "cosine_similarity",
    "instance_contrastive_loss",
    "lora",
    "lora_tensors",
    "masked_mean",
    "most_similar",
    "prototype_contrastive_loss",
    "sequence_loss",
    "total_loss",
]
