"""How many elements one rank's module holds: the model cut by pipeline and tensor parallelism.

Tensor-parallel cuts are even. Norms are whole on every tensor-parallel rank; the first stage has
the embedding, the last one the head. A tied head is a second copy of the embedding when there is
more than one stage.
"""

from dataclasses import dataclass

from megatron_muloco.config.counts import (
    attention_parameters_per_layer,
    mlp_parameters_per_layer,
    norm_parameters_per_layer,
    padded_vocab_size,
)
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.config.schema import ModelConfig, RunConfig
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.topology import Topology

__all__ = ["BYTES", "Slice", "fragment_shares", "stage_slices", "synchronised_elements"]

BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Slice:
    """Elements in the module of each tensor-parallel rank of one pipeline stage.

    Attributes:
        stage: Index of the pipeline stage.
        matrices: Attention and MLP matrices.
        tables: Embedding and output head.
        norms: RMSNorm weights, the same on every tensor-parallel rank.
        tied_copy: Part of ``tables`` for which another stage speaks in the outer step.
    """

    stage: int
    matrices: int
    tables: int
    norms: int
    tied_copy: int

    @property
    def total(self) -> int:
        """All elements."""
        return self.matrices + self.tables + self.norms

    def synchronised(self, tp_rank: int) -> int:
        """Return the elements that a rank's outer group exchanges; duplicates have one holder."""
        return self.matrices + self.tables - self.tied_copy + (self.norms if tp_rank == 0 else 0)


def stage_slices(model: ModelConfig, topology: Topology) -> tuple[Slice, ...]:
    """Return the slice of every pipeline stage, in order."""
    tp, pp = topology.tensor, topology.pipeline
    layers = model.num_layers // pp
    per_layer = attention_parameters_per_layer(model) + mlp_parameters_per_layer(model)
    table = padded_vocab_size(model) * model.hidden_size // tp
    slices = []
    for stage in range(pp):
        first, last = stage == 0, stage == pp - 1
        tied = not model.untie_embeddings_and_output_weights
        head = last and not (tied and first)
        slices.append(
            Slice(
                stage=stage,
                matrices=layers * per_layer // tp,
                tables=(first + head) * table,
                norms=layers * norm_parameters_per_layer(model) + last * model.hidden_size,
                tied_copy=table if head and tied else 0,
            )
        )
    return tuple(slices)


def synchronised_elements(
    model: ModelConfig, topology: Topology, stage: int, tp_rank: int
) -> dict[str, int]:
    """Return the elements that a rank's outer group exchanges, without data parallelism.

    Keys begin like parameter names, so that fragments can be assigned by them; all matrices of a
    layer are one entry, and so are its norms.
    """
    tp, layers = topology.tensor, model.num_layers // topology.pipeline
    first, last = stage == 0, stage == topology.pipeline - 1
    matrices = attention_parameters_per_layer(model) + mlp_parameters_per_layer(model)
    table = padded_vocab_size(model) * model.hidden_size // tp
    elements = {}
    for layer in range(stage * layers, (stage + 1) * layers):
        elements[f"decoder.layers.{layer}.matrices"] = matrices // tp
        if tp_rank == 0:
            elements[f"decoder.layers.{layer}.norms"] = norm_parameters_per_layer(model)
    if first:
        elements["embedding.table"] = table
    if last and model.untie_embeddings_and_output_weights:
        elements["output_layer.table"] = table
    if last and tp_rank == 0:
        elements["decoder.final_layernorm.weight"] = model.hidden_size
    return elements


def fragment_shares(
    config: RunConfig, topology: Topology, stage: int, tp_rank: int
) -> tuple[int, ...]:
    """Return the elements of every fragment that one rank exchanges; none without an outer step."""
    outer = config.outer
    if isinstance(outer, NoOuter):
        return ()
    elements = synchronised_elements(config.model, topology, stage, tp_rank)
    plan = FragmentPlan.by_layer(
        elements,
        num_layers=config.model.num_layers,
        count=outer.fragments.count,
        pattern=outer.fragments.pattern,
    )
    return tuple(
        -(-sum(elements[name] for name in names) // topology.sharding) for names in plan.fragments
    )
