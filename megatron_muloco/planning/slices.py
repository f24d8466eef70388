"""How many elements one rank's module holds, by what is done with them."""

from dataclasses import dataclass

from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.optim.units import is_vector
from megatron_muloco.planning.parameters import stage_parameters
from megatron_muloco.topology import Topology

__all__ = ["BYTES", "Slice", "stage_slices"]

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements in the module of each tensor-parallel rank of one pipeline stage.

    Attributes:
        stage: Index of the pipeline stage.
        matrices: Attention and MLP matrices.
        vectors: Embedding, output head and RMSNorm weights; the first two are cut over
            tensor-parallel ranks, the last are whole on each. A tied head is a second copy of the
            embedding when there is more than one stage.
    """

    stage: int
    matrices: int
    vectors: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.matrices + self.vectors


def stage_slices(model: ModelConfig, topology: Topology) -> tuple[Slice, ...]:
    """Return the slice of every pipeline stage, in order."""
    slices = []
    for stage in range(topology.pipeline):
        parameters = stage_parameters(model, topology, stage=stage, tp_rank=0)
        vectors = sum(param.numel for param in parameters if is_vector(param))
        total = sum(param.numel for param in parameters)
        slices.append(Slice(stage, total - vectors, vectors))
    return tuple(slices)
