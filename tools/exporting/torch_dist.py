"""Whole tensors in Megatron's torch_dist format, written by one process without a launcher."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_muloco.checkpoint.directory import finish_directory

__all__ = ["layer_of_stack", "one_rank", "whole", "write_torch_dist"]


@contextmanager
def one_rank() -> Iterator[None]:
    """Make this process a job of one rank, unless it is in a job already.

    Megatron's planners ask for the rank, also where one process reads or writes alone.
    """
    if torch.distributed.is_initialized():
        yield
        return
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def whole(key: str, values: Tensor) -> ShardedTensor:
    """Return Megatron's description of a tensor that is stored whole."""
    return ShardedTensor.from_rank_offsets(key, values)


def layer_of_stack(key: str, values: Tensor, layer: int, num_layers: int) -> ShardedTensor:
    """Return the description of one layer of a tensor that is stored for all layers together.

    Shapes: ``values`` [...], stored [num_layers, ...].
    """
    return ShardedTensor.from_rank_offsets(key, values, (0, layer, num_layers), prepend_axis_num=1)


def write_torch_dist(
    directory: Path, tensors: Iterable[ShardedTensor], common: dict[str, Any]
) -> None:
    """Write a checkpoint into an existing directory, and fsync it. All tensors are in memory.

    Args:
        directory: The directory.
        tensors: Tensors that cover each key.
        common: Plain values that Megatron calls the common state.
    """
    by_key: dict[str, list[ShardedTensor]] = {}
    for tensor in tensors:
        by_key.setdefault(tensor.key, []).append(tensor)
    with warnings.catch_warnings():
        # torch warns about no_dist, which is on purpose: there is one process.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        state_dict_saver.save(
            mcore_to_pyt_state_dict(by_key),
            storage_writer=FileSystemWriter(directory, sync_files=True),
            planner=MCoreSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    finish_directory(directory, common)
