"""`BatchLayout` maps step, replica, rank and microbatch to samples. No state, no torch.

There is one global order of samples, and step t (from 1) consumes the next B of it in any layout.
For B = 8, two replicas, dp 2, micro-batch 1::

    step 3:  samples   16 17 | 18 19 | 20 21 | 22 23
             replica       0     0      1      1
             dp rank       0     1      0      1
             microbatch  0  1   0  1   0  1   0  1

Blocks are contiguous, so the set of samples of a step depends on neither K, nor dp, nor the
micro-batch size: all of them can change between two steps and no sample is repeated or skipped.
Resuming needs the step number, and after a change of B the samples read before (`offset`).
"""

from dataclasses import dataclass, replace

from megatron_muloco.config.derived import batch_schedule
from megatron_muloco.config.schema import RunConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.topology import Topology

__all__ = ["BatchLayout", "RunLayout", "batch_layout", "run_layout", "samples_of_step", "share"]


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The layout of every step of a run; the batch may rise in stages.

    Attributes:
        stages: First step and layout of each stage; the first step of the first one is 1.
    """

    stages: "tuple[tuple[int, BatchLayout], ...]"

    def at(self, step: int) -> "BatchLayout":
        """Return the layout of an inner step, from 1; that of step 1 for step 0."""
        return next(
            (layout for first, layout in reversed(self.stages) if step >= first),
            self.stages[0][1],
        )

    def consumed(self, step: int) -> int:
        """Return how many samples all replicas together have read after ``step`` steps."""
        return self.at(step).consumed(step)

    def resumed(self, step: int, consumed: int) -> "RunLayout":
        """Return the layout that goes on after ``step`` steps that read ``consumed`` samples."""
        shift = consumed - self.consumed(step)
        return RunLayout(
            tuple(
                (first, replace(layout, offset=layout.offset + shift))
                for first, layout in self.stages
            )
        )


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """Division of the samples of one step over replicas, ranks and microbatches.

    Attributes:
        global_batch_size: Samples per inner step over all replicas (B).
        num_replicas: Number of replicas (K).
        data_parallel_size: Ranks of one replica that read different samples (dp).
        micro_batch_size: Samples of one forward pass.
        offset: What a change of B adds to every index: the samples read before it, less those that
            as many steps of this B read. Negative after a smaller B.
    """

    global_batch_size: int
    num_replicas: int
    data_parallel_size: int
    micro_batch_size: int
    offset: int = 0

    def __post_init__(self) -> None:
        """Raise if the batch cannot be divided evenly."""
        sizes = (self.num_replicas, self.data_parallel_size, self.micro_batch_size)
        product = sizes[0] * sizes[1] * sizes[2]
        if min(*sizes, self.global_batch_size) < 1 or self.global_batch_size % product:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of replicas "
                f"{sizes[0]} x data parallel {sizes[1]} x micro_batch_size {sizes[2]} = {product}, "
                f"so ranks would read different amounts. Change one of them."
            )

    @property
    def num_microbatches(self) -> int:
        """Forward passes of one rank in one step."""
        ranks = self.num_replicas * self.data_parallel_size
        return self.global_batch_size // (ranks * self.micro_batch_size)

    def held_out(self) -> "BatchLayout":
        """Return the layout of evaluation, whose samples do not depend on the number of replicas.

        It is that of a single replica; `share` divides its forward passes over several.
        """
        return replace(self, num_replicas=1, offset=0)

    def at(self, step: int) -> "BatchLayout":
        """Return this layout: it is that of every step. See `RunLayout`."""
        return self

    def consumed(self, step: int) -> int:
        """Return how many samples all replicas together have read after ``step`` steps."""
        return self.offset + step * self.global_batch_size

    def indices(self, step: int, replica: int, dp_rank: int, microbatch: int) -> range:
        """Return the indices in the global order that one forward pass reads.

        Args:
            step: Inner step, from 1.
            replica: Replica index, below K.
            dp_rank: Data-parallel rank inside the replica.
            microbatch: Index of the forward pass within the step.
        """
        limits = (self.num_replicas, self.data_parallel_size, self.num_microbatches)
        for name, value, limit in zip(
            ("replica", "dp_rank", "microbatch"),
            (replica, dp_rank, microbatch),
            limits,
            strict=True,
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name} {value} is not in [0, {limit})")
        rank = replica * self.data_parallel_size + dp_rank
        forward_pass = rank * self.num_microbatches + microbatch
        first = samples_of_step(step, self.global_batch_size).start
        start = self.offset + first + forward_pass * self.micro_batch_size
        return range(start, start + self.micro_batch_size)


def batch_layout(config: RunConfig, topology: Topology) -> BatchLayout:
    """Return the layout of a config's batch, after the ramp-up."""
    training = config.training
    return BatchLayout(
        training.global_batch_size, topology.num_replicas, topology.data, training.micro_batch_size
    )


def run_layout(config: RunConfig, topology: Topology) -> RunLayout:
    """Return the layouts of a config's run from its first sample on."""
    layout, batches = batch_layout(config, topology), batch_schedule(config.training)

    def stage(first: int, batch: int) -> BatchLayout:
        offset = batches.consumed(first - 1) - (first - 1) * batch
        return replace(layout, global_batch_size=batch, offset=offset)

    return RunLayout(tuple((first, stage(first, batch)) for first, batch in batches.stages))


def share(count: int, index: int, of: int) -> range:
    """Return the part ``index`` of ``count`` items divided over ``of``, one directly after another.

    Sizes differ by one at most; with fewer items than parts some are empty.
    """
    return range(count * index // of, count * (index + 1) // of)


def samples_of_step(step: int, global_batch_size: int) -> range:
    """Return the indices that all ranks together read at a step (from 1), for an offset of 0."""
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    return range((step - 1) * global_batch_size, step * global_batch_size)
