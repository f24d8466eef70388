"""Model-wide parameter names, and `ParamInfo` from what Megatron knows about each parameter.

Inside a pipeline stage Megatron numbers layers from zero. Everything in this package (fragments,
parameter tables, checkpoints, initialisation) uses names whose layers count over the whole model,
so that a parameter keeps its name when the pipeline is cut differently.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.params import ParamInfo

__all__ = ["EMBEDDING", "OUTPUT", "describe_parameters", "named_parameters", "partition_dim"]

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (model-wide name, parameter) of one pipeline stage's GPTModel, in its own order.

    The tied output embedding of the last stage gets the name of the embedding that it repeats.
    """
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    stage: Any = model
    offsets = [layer.layer_number - 1 for layer in stage.decoder.layers]
    for name, parameter in model.named_parameters():
        match = _LAYER.match(name)
        if match:
            layer = offsets[int(match.group(1))]
            yield f"decoder.layers.{layer}.{name[match.end() :]}", parameter
        elif name == OUTPUT and tied:
            yield EMBEDDING, parameter
        else:
            yield name, parameter


def describe_parameters(
    model: nn.Module, *, tensor_rank: int
) -> dict[str, tuple[ParamInfo, nn.Parameter]]:
    """Return every trainable parameter of this stage with its `ParamInfo`, by model-wide name.

    Args:
        model: The bare GPTModel of one pipeline stage.
        tensor_rank: This rank's place in its tensor-parallel group.

    Raises:
        RuntimeMismatch: Two parameters got one name, so one of them would never be synchronised.
    """
    described: dict[str, tuple[ParamInfo, nn.Parameter]] = {}
    on_later_stage = not getattr(model, "pre_process", True)
    for name, parameter in named_parameters(model):
        if not parameter.requires_grad:
            continue
        if name in described:
            raise RuntimeMismatch(f"two parameters of this pipeline stage are both named {name}")
        dim = partition_dim(parameter)
        info = ParamInfo(
            name=name,
            local_shape=tuple(parameter.shape),
            partition_dim=dim,
            duplicate=(dim is None and tensor_rank > 0) or (name == EMBEDDING and on_later_stage),
        )
        described[name] = (info, parameter)
    return described


def partition_dim(parameter: nn.Parameter) -> int | None:
    """Return the dimension that is split over tensor-parallel ranks, or ``None``."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    marked: Any = parameter
    return int(marked.partition_dim)
