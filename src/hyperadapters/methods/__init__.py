"""The methods, which determine the adapters of the rows of a batch.

`pha` is the method of the paper. The others are the methods that it is compared with. All of them implement one
interface (`base.Method`), so that no other part of the library depends on a particular method, except for the functions
that only "pha" has.
"""

from collections.abc import Callable, Sequence

from hyperadapters.config import Method as MethodName
from hyperadapters.config import ModelConfig
from hyperadapters.core import AdapterTensor
from hyperadapters.methods.base import Method
from hyperadapters.methods.hyperdecoder import HyperDecoder
from hyperadapters.methods.hyperformer import HyperFormer
from hyperadapters.methods.learned import LearnedMethod
from hyperadapters.methods.pha import PHA

__all__ = ["METHODS", "PHA", "HyperDecoder", "HyperFormer", "LearnedMethod", "Method", "make_method"]

METHODS: dict[MethodName, Callable[[ModelConfig, int, int, int, Sequence[AdapterTensor]], Method]] = {
    "pha": PHA,
    "hyperformer": HyperFormer,
    "hyperdecoder": HyperDecoder,
    "shared_adapter": LearnedMethod,
    "task_adapter": LearnedMethod,
}


def make_method(
    config: ModelConfig, num_tasks: int, num_layers: int, hidden_size: int, tensors: Sequence[AdapterTensor]
) -> Method:
    """Make a method with fresh weights.

    Args:
        config: Settings with all defaults resolved; `config.method` is the name of the method.
        num_tasks: Number T of tasks.
        num_layers: Number L of layers with generated adapters.
        hidden_size: Size d of the backbone's hidden states.
        tensors: Tensors of an adapter in one layer.

    Returns:
        The method.
    """
    return METHODS[config.method](config, num_tasks, num_layers, hidden_size, tensors)
