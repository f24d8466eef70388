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

from megatron_muloco.errors import ConfigError

__all__ = ["BatchLayout", "samples_of_step"]


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
        """Return the layout of evaluation: every replica reads the same samples."""
        return replace(self, num_replicas=1, offset=0)

    def resumed(self, step: int, consumed: int) -> "BatchLayout":
        """Return the layout that goes on after ``step`` steps that read ``consumed`` samples."""
        return replace(self, offset=consumed - step * self.global_batch_size)

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


def samples_of_step(step: int, global_batch_size: int) -> range:
    """Return the indices that all ranks together read at a step (from 1), for an offset of 0."""
    if step < 1:
        raise ValueError(f"step {step}: steps are counted from 1")
    return range((step - 1) * global_batch_size, step * global_batch_size)
