"""The anchor as a plain Megatron checkpoint: Megatron's keys, nothing of ours."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedBase,
    ShardedObject,
    ShardedTensorFactory,
    apply_factories,
    is_main_replica,
)
from torch import Tensor

from megatron_muloco.checkpoint import layout
from megatron_muloco.checkpoint.sharding import ModelSpace
from megatron_muloco.checkpoint.state import Masters
from megatron_muloco.checkpoint.storage import everywhere, finish_directory
from megatron_muloco.checkpoint.store import write_published
from megatron_muloco.comm.groups import Groups
from megatron_muloco.model.names import named_parameters
from megatron_muloco.runtime.accelerator import training_device

__all__ = ["export_anchor"]

# What Megatron's own training writes since its checkpoints have had versions.
_MEGATRON_CHECKPOINT_VERSION = 3.0


def export_anchor(
    directory: Path,
    step: int,
    *,
    groups: Groups,
    model: torch.nn.Module,
    view: Masters,
    dtype: torch.dtype,
) -> Path:
    """Write the masters as ``directory/iter_<step>``, loadable by Megatron as a model; return it.

    Call it while the masters hold the anchor: after `CheckpointStore.load_anchor`, or inside
    ``synchronizer.anchor_loaded()``.

    Args:
        directory: Gets the checkpoint and Megatron's file that names the latest one.
        step: Inner steps made; Megatron's iteration.
        groups: This rank's groups.
        model: The bare GPTModel of this rank's stage.
        view: Masters of this rank.
        dtype: Of the written weights, usually bf16.

    Raises:
        CheckpointError: It could not be written.

    Collectives: every rank of the job calls it; replica 0 writes.
    """
    path = layout.checkpoint_path(directory, step)
    space = ModelSpace(groups, view.infos, view.shards, training_device())
    primary = [name for name, info in view.infos.items() if not info.duplicate]
    whole = space.gather(view.masters, primary)
    entries = _entries(model, groups, whole, dtype) if groups.coords.replica == 0 else []
    common = {"iteration": step, "checkpoint_version": _MEGATRON_CHECKPOINT_VERSION}
    write_published(path, entries, lambda temporary: finish_directory(temporary, common))
    with everywhere(f"{directory} could not be brought up to date", "The export is whole."):
        if torch.distributed.get_rank() == 0:
            layout.set_latest(directory, step)
    return path


def _entries(
    model: Any, groups: Groups, whole: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[ShardedBase]:
    """Yield what Megatron would write for this rank, with our values of the parameters held here.

    Beside parameters Megatron expects an object a linear layer, which is empty without fp8.
    """
    described = model.sharded_state_dict(metadata={"dp_cp_group": groups.pg.dp_cp})
    own_names = (name for name, _ in model.named_parameters())
    for own_name, (name, _) in zip(own_names, named_parameters(model), strict=True):
        if name not in whole:
            continue
        entry, data = described[own_name], whole[name].to(dtype)
        if isinstance(entry, ShardedTensorFactory):
            built: dict[str, Any] = {"": replace(entry, data=data)}
            apply_factories(built)
        else:
            built = {"": replace(entry, data=data, dtype=dtype)}
        for tensor in nested_values(built):
            yield replace(tensor, replica_id=0)
    for entry in nested_values(described):
        if isinstance(entry, ShardedObject) and is_main_replica(entry.replica_id):
            yield entry
