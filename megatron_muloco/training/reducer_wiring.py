"""How pseudogradients travel: the reducer that a config asks for."""

from collections.abc import Sequence

import torch

from megatron_muloco.comm.background import Background
from megatron_muloco.comm.chunks import row_places
from megatron_muloco.comm.groups import Groups
from megatron_muloco.comm.quantised import EncodedMean
from megatron_muloco.comm.reducers import mean_reducer
from megatron_muloco.comm.sparse import GatheredMean
from megatron_muloco.compress.build import codec_chooser
from megatron_muloco.config.compression import NoCompression, TopKCompression
from megatron_muloco.config.outer import AverageOuter, NesterovOuter
from megatron_muloco.outer.reducer import Reducer
from megatron_muloco.shards import Shard

__all__ = ["build_plain_reducer", "build_reducer"]


def build_reducer(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
) -> Reducer:
    """Return the reducer for pseudogradients of ``shards``; with overlap it works beside training.

    An all-reduce of device memory does so by itself; everything else has phases that somebody has
    to work on.
    """
    reducer = _foreground(outer, groups, device, shards)
    return Background(reducer, device) if outer.reduces_in_thread else reducer


def build_plain_reducer(
    outer: NesterovOuter | AverageOuter, groups: Groups, device: torch.device
) -> Reducer:
    """Return the fp32 mean without a code, for the flush; deterministic where the run is."""
    code = outer.compression
    return mean_reducer(
        groups.exchange,
        device,
        deterministic=not isinstance(code, NoCompression) or code.deterministic,
        through_host=outer.sends_from_host,
    )


def _foreground(
    outer: NesterovOuter | AverageOuter,
    groups: Groups,
    device: torch.device,
    shards: Sequence[Shard],
) -> Reducer:
    code = outer.compression
    if isinstance(code, NoCompression):
        return mean_reducer(
            groups.exchange,
            device,
            wire_dtype=code.wire_dtype,
            deterministic=code.deterministic,
            through_host=outer.sends_from_host,
        )
    encoding = GatheredMean if isinstance(code, TopKCompression) else EncodedMean
    return encoding(
        groups.exchange,
        device,
        codec_chooser(code),
        row_places(shards),
        code.error_decay if code.error_feedback else None,
        through_host=outer.sends_from_host,
    )
