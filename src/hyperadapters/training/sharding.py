"""What the processes that train together share: files of one machine, and the first one's right to write."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch.distributed as dist


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
