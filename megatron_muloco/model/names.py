"""Model-wide parameter names, and `ParamInfo` from what Megatron knows about each parameter.

Inside a pipeline stage Megatron numbers layers from zero. Everything in this package (fragments,
parameter tables, checkpoints, initialisation) uses names whose layers count over the whole model,
so that a parameter keeps its name when the pipeline is cut differently. Which names an architecture
has is in its `ParameterNames`.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.params import GPT_NAMES, ParameterNames, ParamInfo

__all__ = ["describe_parameters", "named_parameters", "partition_dim"]


def named_parameters(
    model: nn.Module, names: ParameterNames = GPT_NAMES
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield (model-wide name, parameter) of one pipeline stage's model, in its own order.

    The tied output embedding of the last stage gets the name of the embedding that it repeats.

    Args:
        model: The bare model of one pipeline stage. Its layers have a ``layer_number``, counted
            from 1 over all stages, as Megatron's have.
        names: Names of the architecture.
    """
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    layers: Any = model.get_submodule(names.layers)
    numbers = [layer.layer_number - 1 for layer in layers]
    for name, parameter in model.named_parameters():
        place = names.layer_of(name)
        if place is not None:
            yield names.in_layer(numbers[place[0]], place[1]), parameter
        elif name == names.output and tied:
            yield names.embedding, parameter
        else:
            yield name, parameter


def describe_parameters(
    model: nn.Module, *, tensor_rank: int, names: ParameterNames = GPT_NAMES
) -> dict[str, tuple[ParamInfo, nn.Parameter]]:
    """Return every trainable parameter of this stage with its `ParamInfo`, by model-wide name.

    Args:
        model: The bare model of one pipeline stage.
        tensor_rank: This rank's place in its tensor-parallel group.
        names: Names of the architecture.

    Raises:
        RuntimeMismatch: Two parameters got one name, so one of them would never be synchronised.
    """
    described: dict[str, tuple[ParamInfo, nn.Parameter]] = {}
    on_later_stage = not getattr(model, "pre_process", True)
    for name, parameter in named_parameters(model, names):
        if not parameter.requires_grad:
            continue
        if name in described:
            raise RuntimeMismatch(f"two parameters of this pipeline stage are both named {name}")
        dim = partition_dim(parameter)
        is_copy = (dim is None and tensor_rank > 0) or (name == names.embedding and on_later_stage)
        info = ParamInfo.from_name(
            name,
            tuple(parameter.shape),
            dim,
            is_primary=not is_copy,
            names=names,
        )
        described[name] = (info, parameter)
    return described


def partition_dim(parameter: nn.Parameter) -> int | None:
    """Return the dimension that is split over tensor-parallel ranks, or ``None``."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    marked: Any = parameter
    return int(marked.partition_dim)
