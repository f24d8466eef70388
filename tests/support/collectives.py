"""`counted_collectives`: counts collectives by the ranks that take part.

The calls are counted on `ProcessGroup` itself, below torch, DeepSpeed and Megatron.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed import ProcessGroup

_METHODS = (
    "_allgather_base",
    "_reduce_scatter_base",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "allreduce",
    "allreduce_coalesced",
    "alltoall",
    "alltoall_base",
    "barrier",
    "broadcast",
    "gather",
    "recv",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor_coalesced",
    "scatter",
    "send",
)


@contextmanager
def counted_collectives() -> Iterator[Counter[tuple[int, ...]]]:
    """Yield a counter of calls by their group's global ranks; groups of one rank do not count."""
    calls: Counter[tuple[int, ...]] = Counter()
    # Read from the class's dictionary: the object that getattr returns would not bind to a group
    # any more once it is put back.
    originals = {name: vars(ProcessGroup)[name] for name in _METHODS if name in vars(ProcessGroup)}

    def counting(name: str) -> Any:
        original = getattr(ProcessGroup, name)

        def method(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
            ranks = tuple(torch.distributed.get_process_group_ranks(group))
            if len(ranks) > 1:
                calls[ranks] += 1
            return original(group, *args, **kwargs)

        return method

    for name in originals:
        setattr(ProcessGroup, name, counting(name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(ProcessGroup, name, original)
