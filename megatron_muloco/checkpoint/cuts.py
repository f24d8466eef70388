"""Where a tensor-parallel piece lies in the whole parameter. No torch: arithmetic on shapes.

Megatron cuts a parameter along one dimension into equal slices, one for each tensor-parallel rank.
The fused MLP input is the exception: gate and up are cut separately and every rank stacks its two
slices::

    whole   | gate 0 | gate 1 | up 0 | up 1 |        rank 0 holds | gate 0 | up 0 |

The fused q, k and v need no rule: a rank holds whole query groups, which follow each other in the
whole.
"""

from dataclasses import dataclass

from megatron_muloco.shards import ParamInfo

__all__ = ["Cut"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One rank's piece of one parameter.

    Attributes:
        param: The parameter as this rank holds it.
        tensor_rank: This rank's place among the tensor-parallel ranks.
        tensor_size: Number of tensor-parallel ranks.
    """

    param: ParamInfo
    tensor_rank: int
    tensor_size: int

    @property
    def dim(self) -> int:
        """Dimension that is cut; 0 where nothing is."""
        return self.param.partition_dim or 0

    @property
    def slices(self) -> int:
        """Slices of each block; 1 where every rank holds the whole parameter."""
        return 1 if self.param.partition_dim is None else self.tensor_size

    @property
    def index(self) -> int:
        """Which slice of each block this rank holds."""
        return 0 if self.param.partition_dim is None else self.tensor_rank

    @property
    def blocks(self) -> int:
        """Blocks along ``dim`` that are cut separately and stacked by every rank."""
        return 2 if self.param.name.endswith(".mlp.linear_fc1.weight") else 1

    @property
    def slice_length(self) -> int:
        """Length along ``dim`` of one slice of one block."""
        return self.param.local_shape[self.dim] // self.blocks

    @property
    def global_shape(self) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        shape = list(self.param.local_shape)
        shape[self.dim] *= self.slices
        return tuple(shape)
