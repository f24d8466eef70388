"""How pseudogradients travel: the reducer that a config asks for."""

from collections.abc import Sequence

import torch

from megatron_muloco.comm.background import Background
from megatron_muloco.comm.chunks import row_places
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.quantised import EncodedMean
from megatron_muloco.comm.reducers import AllReduceMean, mean_reducer
from megatron_muloco.comm.sparse import GatheredMean
from megatron_muloco.compress.build import codec_chooser
from megatron_muloco.config import RunConfig
from megatron_muloco.config.compression import NoCompression, TopKCompression
from megatron_muloco.config.outer import AverageOuter, NesterovOuter, NoOuter
from megatron_muloco.outer.reducer import Reducer
from megatron_muloco.shards import Shard

__all__ = ["build_plain_reducer", "build_reducer", "travels_by_host"]


def travels_by_host(config: RunConfig) -> bool:
    """Whether pseudogradients leave from host memory; ``transport: auto`` never does."""
    return not isinstance(config.outer, NoOuter) and config.outer.transport == "host"


def build_reducer(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
) -> Reducer:
    """Return the reducer of the pseudogradients of ``shards``.

    With overlap it works beside training. An all-reduce of device memory does so by itself;
    everything else has phases that somebody has to work on.
    """
    through_host = outer.transport == "host"
    reducer = _foreground(outer, groups, device, shards, through_host=through_host)
    if outer.overlap_steps and (through_host or not isinstance(reducer, AllReduceMean)):
        return Background(reducer, device)
    return reducer


def build_plain_reducer(
    outer: NesterovOuter | AverageOuter, groups: Groups, device: torch.device
) -> Reducer:
    """Return the fp32 mean without a code, for the flush; deterministic where the run is."""
    code = outer.compression
    return mean_reducer(
        groups.exchange,
        device,
        deterministic=not isinstance(code, NoCompression) or code.deterministic,
        through_host=outer.transport == "host",
    )


def _foreground(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
    *,
    through_host: bool,
) -> Reducer:
    code = outer.compression
    if isinstance(code, NoCompression):
        return mean_reducer(
            groups.exchange,
            device,
            wire_dtype=code.wire_dtype,
            deterministic=code.deterministic,
            through_host=through_host,
        )
    encoding = GatheredMean if isinstance(code, TopKCompression) else EncodedMean
    return encoding(
        groups.exchange,
        device,
        codec_chooser(code),
        row_places(shards),
        code.error_decay if code.error_feedback else None,
        through_host=through_host,
    )
