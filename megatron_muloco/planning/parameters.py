"""The parameters of one rank's module, by name and shape, without building it.

A stage has them in the order of Megatron's modules, which is the order of everything that is laid
end to end: the gradient buffer, the fragments, the chunks of the outer group.
"""

from collections.abc import Iterator

from megatron_muloco.config.counts import padded_vocab_size
from megatron_muloco.config.schema import ModelConfig
from megatron_muloco.shards import ParamInfo
from megatron_muloco.topology import Topology

__all__ = ["EMBEDDING", "stage_parameters"]

EMBEDDING = "embedding.word_embeddings.weight"
_OUTPUT = "output_layer.weight"


def stage_parameters(
    model: ModelConfig, topology: Topology, *, stage: int, tp_rank: int
) -> tuple[ParamInfo, ...]:
    """Return what `model.names.describe_parameters` says of a built stage, in its order.

    Args:
        model: The model.
        topology: Its tensor and pipeline sizes count.
        stage: Pipeline stage.
        tp_rank: Place in the tensor-parallel group; the norms of others than 0 are duplicates.
    """
    tensor, first, last = topology.tensor, stage == 0, stage == topology.pipeline - 1
    per_stage = model.num_layers // topology.pipeline
    table = (padded_vocab_size(model) // tensor, model.hidden_size)
    parameters = []
    if first:
        parameters.append(ParamInfo(EMBEDDING, table, 0, duplicate=False))
    for layer in range(stage * per_stage, (stage + 1) * per_stage):
        parameters += [
            ParamInfo(f"decoder.layers.{layer}.{name}.weight", shape, dim, duplicate=False)
            if dim is not None
            else _norm(f"decoder.layers.{layer}.{name}.weight", shape, tp_rank)
            for name, shape, dim in _layer(model, tensor)
        ]
    if last:
        parameters.append(_norm("decoder.final_layernorm.weight", (model.hidden_size,), tp_rank))
    if last and model.untie_embeddings_and_output_weights:
        parameters.append(ParamInfo(_OUTPUT, table, 0, duplicate=False))
    elif last and not first:  # a tied head repeats the embedding, whose name it has
        parameters.append(ParamInfo(EMBEDDING, table, 0, duplicate=True))
    return tuple(parameters)


def _layer(model: ModelConfig, tensor: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Yield name, local shape and partition dimension of one layer's parameters."""
    hidden, ffn, head = model.hidden_size, model.ffn_hidden_size, model.kv_channels
    queries, keys = model.num_attention_heads * head, model.query_groups * head
    yield "input_layernorm", (hidden,), None
    yield "self_attention.linear_proj", (hidden, queries // tensor), 1
    if model.post_layernorm:
        yield "self_attention.linear_proj.post_norm", (hidden,), None
    yield "self_attention.linear_qkv", ((queries + 2 * keys) // tensor, hidden), 0
    if model.qk_layernorm:
        yield "self_attention.q_layernorm", (head,), None
        yield "self_attention.k_layernorm", (head,), None
    yield "pre_mlp_layernorm", (hidden,), None
    yield "mlp.linear_fc1", (2 * ffn // tensor, hidden), 0
    yield "mlp.linear_fc2", (hidden, ffn // tensor), 1
    if model.post_layernorm:
        yield "mlp.linear_fc2.post_norm", (hidden,), None


def _norm(name: str, shape: tuple[int, ...], tp_rank: int) -> ParamInfo:
    return ParamInfo(name, shape, None, duplicate=tp_rank > 0)
