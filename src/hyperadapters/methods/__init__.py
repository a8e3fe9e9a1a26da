"""The methods: where the adapters of a batch come from.

`pha` is the method of the paper, the others are what it is compared with. All share one interface (`base.Method`), so
that backbones, training, prediction and checkpoints know no method by name.
"""

from collections.abc import Sequence

from hyperadapters.config import Method as MethodName
from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor
from hyperadapters.methods.base import Method
from hyperadapters.methods.hyperdecoder import HyperDecoder
from hyperadapters.methods.hyperformer import HyperFormer
from hyperadapters.methods.learned import LearnedMethod
from hyperadapters.methods.pha import PHA

__all__ = ["METHODS", "PHA", "HyperDecoder", "HyperFormer", "LearnedMethod", "Method", "make_method"]

METHODS: dict[MethodName, type[PHA | HyperFormer | HyperDecoder | LearnedMethod]] = {
    "pha": PHA,
    "hyperformer": HyperFormer,
    "hyperdecoder": HyperDecoder,
    "shared_adapter": LearnedMethod,
    "task_adapter": LearnedMethod,
}


def make_method(
    config: ModelConfig, num_tasks: int, num_layers: int, hidden_size: int, tensors: Sequence[AdapterTensor]
) -> Method:
    """Make the method that `config.method` names, with fresh weights; the arguments are those of `PHA`."""
    return METHODS[config.method](config, num_tasks, num_layers, hidden_size, tensors)
