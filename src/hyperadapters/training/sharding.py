"""What the processes that train together share: files of one machine, weights, and the first one's right to write."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hyperadapters.backbones.devices import is_offloaded
from hyperadapters.backbones.loading import has_tensor_subclasses
from hyperadapters.errors import BackboneError
from hyperadapters.model.model import HyperAdapterModel


def num_processes() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """Return the index of this process among those that train together; the one with index 0 writes files."""
    return dist.get_rank() if num_processes() > 1 else 0


def wait_for_all() -> None:
    """Wait until all processes have reached this line."""
    if num_processes() > 1:
        dist.barrier()


def shared_file(folder: Path, allocate: Callable[[int], None]) -> IO[bytes]:
    """Open an anonymous file that the processes of a machine share. Each process must call this function.

    Args:
        folder: Folder of the file.
        allocate: Function that is called with the descriptor of the new file by one process of the machine.

    Returns:
        The file. It disappears when the last process closes it.

    Raises:
        OSError: If the file cannot be created or opened.
    """
    name = None
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        descriptor, name = tempfile.mkstemp(dir=folder)
        try:
            allocate(descriptor)
        except OSError:
            os.unlink(name)
            raise
        finally:
            os.close(descriptor)
    names: list[tuple[str, str | None]] = [("", None)] * num_processes()
    dist.all_gather_object(names, (socket.gethostname(), name))
    shared = next(other for host, other in names if host == socket.gethostname() and other is not None)
    file = open(shared, "r+b")  # noqa: SIM115 - the caller keeps it open
    wait_for_all()
    if name is not None:
        os.unlink(name)
    return file


def shard_layers(model: HyperAdapterModel, device_type: str) -> None:
    """Divide the weights of a backbone's layers among the processes, with FSDP2 of PyTorch.

    Each process must call this function. A layer is gathered when it runs, and freed afterwards. Its weights are frozen
    and have neither gradients nor optimizer states. All other weights, among them those that are trained and the
    embeddings, stay complete in each process. DDP trains them as without this function.

    Args:
        model: Model whose backbone is changed in place. From then on, all processes must run its passes together.
        device_type: Type of the device on which the model is trained, such as "cuda".

    Raises:
        BackboneError: If weights are quantised or offloaded.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
        return
    if has_tensor_subclasses(model.backbone) or is_offloaded(model.backbone):
        raise BackboneError(
            "shard_backbone: quantised or offloaded weights cannot be divided among processes; load the backbone "
            "without quantisation and device_map, or remove shard_backbone"
        )
    mesh = init_device_mesh(device_type, (num_processes(),))
    for layer in model.passes.layers:
        # The position biases of T5 are also read while their layer does not run.
        kept = {weight for part in layer.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()}
        # Passes through a part of the backbone do not run it as a whole, so each layer is a root of its own, and a
        # root keeps its gathered weights by default.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=kept)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, _sharded_names(model))


def is_sharded(model: HyperAdapterModel) -> bool:
    """Return whether the weights of a model's backbone are divided among the processes.

    Args:
        model: The model.
    """
    return num_processes() > 1 and bool(_sharded_names(model))


def _sharded_names(model: HyperAdapterModel) -> list[str]:
    from torch.distributed.tensor import DTensor

    return [name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)]
