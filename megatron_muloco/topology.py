"""`Topology`: the grid of ranks as pure arithmetic, without torch or process groups.

The world is replica-major: replica r owns the ranks [r*S, (r+1)*S) with S = tp*cp*dp*pp. Inside a
replica, tensor-parallel ranks are neighbours::

    rank = (((replica*PP + pp)*DP + dp)*CP + cp)*TP + tp

    2 replicas x tp 2 x pp 1 x dp 2:      replica 0: [0 1] [2 3]     replica 1: [4 5] [6 7]
                                                      dp 0  dp 1                dp 0  dp 1
    outer groups (equal positions):       (0,4) (1,5) (2,6) (3,7)
"""

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from typing_extensions import override

from megatron_muloco.errors import TopologyError

__all__ = ["Axis", "Coords", "Topology"]

Axis = Literal["tp", "cp", "dp", "pp", "replica"]


_MOST_RANKS = 2**16  # the plan looks at every rank


class Coords(NamedTuple):
    """A rank's index on every axis, slowest axis first."""

    replica: int
    pp: int
    dp: int
    cp: int
    tp: int


@dataclass(frozen=True, slots=True)
class Topology:
    """The sizes of the five axes of the rank grid; their product is the world size.

    Attributes:
        num_replicas: K, the number of replicas.
        tensor: Tensor-parallel size; the ranks that slice each matrix.
        pipeline: Pipeline-parallel size; the stages that the layers are divided into.
        data: Data-parallel size; the ranks of one replica that read different samples.
        context: Context-parallel size; the ranks that share each sequence.
    """

    num_replicas: int
    tensor: int
    pipeline: int
    data: int
    context: int = 1

    def __post_init__(self) -> None:
        """Raise TopologyError for sizes below one."""
        for name, size in zip(("replicas", "pp", "dp", "cp", "tp"), self._sizes, strict=True):
            if size < 1:
                raise TopologyError(f"{name} is {size}; every axis needs a size of at least 1")
        if math.prod(self._sizes) > _MOST_RANKS:
            raise TopologyError(
                f"{math.prod(self._sizes)} ranks are more than the {_MOST_RANKS} that a job may "
                "have. Use smaller parallel sizes (parallel section) or fewer ranks."
            )

    @classmethod
    def from_world(
        cls,
        world_size: int,
        *,
        num_replicas: int,
        tensor: int,
        pipeline: int,
        context: int = 1,
    ) -> "Topology":
        """Return the topology whose data-parallel size fills ``world_size`` ranks.

        Raises:
            TopologyError: The product of the fixed axes does not divide ``world_size``; the message
                gives the whole product.
        """
        smallest = cls.smallest_world(
            num_replicas=num_replicas, tensor=tensor, pipeline=pipeline, context=context
        )
        data, left_over = divmod(world_size, smallest.world_size)
        if data < 1 or left_over:
            context_part = f" x cp {context}" if context > 1 else ""
            plural = "replicas" if num_replicas > 1 else "replica"
            needed = (
                f"{smallest.world_size}·d"
                if data < 1
                else f"{smallest.world_size}·d (so {data * smallest.world_size} or "
                f"{(data + 1) * smallest.world_size})"
            )
            raise TopologyError(
                f"{num_replicas} {plural} x tp {tensor} x pp {pipeline}{context_part} x dp d = "
                f"{needed} ranks, but there are {world_size}.\n"
                "  The number of ranks is the product of these sizes, and d is a whole number. "
                f"Start a multiple of {smallest.world_size} ranks, or change "
                "parallel.num_replicas, parallel.tensor_model_parallel_size or "
                "parallel.pipeline_model_parallel_size."
            )
        return cls(num_replicas, tensor, pipeline, data, context)

    @classmethod
    def smallest_world(
        cls, *, num_replicas: int, tensor: int, pipeline: int, context: int = 1
    ) -> "Topology":
        """Return the topology with one data-parallel rank per replica."""
        return cls(num_replicas, tensor, pipeline, 1, context)

    @property
    def _sizes(self) -> tuple[int, int, int, int, int]:
        """Axis sizes in the order of the fields of `Coords`."""
        return (self.num_replicas, self.pipeline, self.data, self.context, self.tensor)

    @property
    def world_size(self) -> int:
        """Number of ranks of all replicas."""
        return math.prod(self._sizes)

    @property
    def replica_size(self) -> int:
        """Number of ranks of one replica."""
        return self.world_size // self.num_replicas

    @property
    def stage_size(self) -> int:
        """Number of ranks of one stage group: one pipeline stage of one replica."""
        return self.tensor * self.context * self.data

    @property
    def sharding(self) -> int:
        """Number of ranks over which inner optimizer state is sharded (dp x cp)."""
        return self.data * self.context

    def coords(self, rank: int) -> Coords:
        """Return the coordinates of ``rank``."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank} is not in a world of {self.world_size} ranks: {self}")
        rest, tp = divmod(rank, self.tensor)
        rest, cp = divmod(rest, self.context)
        rest, dp = divmod(rest, self.data)
        replica, pp = divmod(rest, self.pipeline)
        return Coords(replica, pp, dp, cp, tp)

    def rank(self, coords: Coords) -> int:
        """Return the rank at ``coords``."""
        rank = 0
        for name, index, size in zip(Coords._fields, coords, self._sizes, strict=True):
            if not 0 <= index < size:
                raise TopologyError(f"{name} index {index} is outside [0, {size}): {self}")
            rank = rank * size + index
        return rank

    def position(self, rank: int) -> int:
        """Return the rank's index inside its replica; equal positions hold equal shards."""
        self.coords(rank)
        return rank % self.replica_size

    def groups(self, *axes: Axis) -> list[tuple[int, ...]]:
        """Return the groups of ranks that differ along ``axes`` only; they partition the world.

        ``groups("replica")`` returns the outer groups, ``groups("tp", "cp", "dp")`` the stage
        groups and ``groups("tp", "cp", "dp", "pp")`` the replicas. Ranks ascend within a group,
        and groups are sorted by their first rank.
        """
        free = [name in axes for name in Coords._fields]
        fixed_ranges = [
            range(1) if is_free else range(size)
            for is_free, size in zip(free, self._sizes, strict=True)
        ]
        free_ranges = [
            range(size) if is_free else range(1)
            for is_free, size in zip(free, self._sizes, strict=True)
        ]
        return [
            tuple(
                self.rank(Coords(*(a + b for a, b in zip(start, offset, strict=True))))
                for offset in product(*free_ranges)
            )
            for start in product(*fixed_ranges)
        ]

    def group_of(self, rank: int, *axes: Axis) -> tuple[int, ...]:
        """Return the one of ``groups(*axes)`` that contains ``rank``."""
        own = self.coords(rank)
        indices = [
            range(size) if name in axes else (own[place],)
            for place, (name, size) in enumerate(zip(Coords._fields, self._sizes, strict=True))
        ]
        return tuple(self.rank(Coords(*place)) for place in product(*indices))

    @override
    def __str__(self) -> str:
        """Return the whole product: ``16 replicas x tp 4 x pp 2 x dp 8 = 1024 ranks``."""
        context = f" x cp {self.context}" if self.context > 1 else ""
        return (
            f"{self.num_replicas} {'replicas' if self.num_replicas > 1 else 'replica'} x tp "
            f"{self.tensor} x pp {self.pipeline}{context} x dp {self.data} = {self.world_size} "
            f"{'ranks' if self.world_size > 1 else 'rank'}"
        )
