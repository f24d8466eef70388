"""The MuLoCo code's weight initialisation, with the same values for every layout.

Each tensor is drawn whole from a generator seeded by the run's seed and the tensor's name, and
every rank keeps its slice: the initial model depends neither on tensor nor pipeline nor data
parallelism, nor on the replica, nor on the order in which modules are built.
"""

import hashlib
import math
from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.model.names import named_parameters, partition_dim
from megatron_muloco.params import GPT_NAMES, ParameterNames, ParamInfo

__all__ = ["has_poison", "initialise_weights", "poison", "poison_weights"]

# Values of facebookresearch/MuLoCo at commit 475bbf4, layer counted from 0:
#
#     embedding        N(0, 1)
#     q, k, v, gate    truncated normal, std 0.02
#     proj, up, down   truncated normal, std 0.02 / sqrt(2 (layer + 1))
#     output head      truncated normal, std hidden_size^-0.5, cut at three standard deviations
#
# That code never ties the embedding to the head. A tied table is drawn as the head: with unit
# variance its logits would have the variance hidden_size, and the first loss be tens of nats.
# fairseq initialises a tied table with this scale; Mesh TensorFlow applies it to the tied logits.
_HEAD_CUT = 3.0
# Layer weights are cut at an absolute 2.0, as in that code; at std 0.02 it has no effect.
_LAYER_CUT = 2.0


def initialise_weights(
    model: nn.Module,
    pg: ProcessGroupCollection,
    *,
    seed: int,
    std: float,
    hidden_size: int,
    names: ParameterNames = GPT_NAMES,
) -> None:
    """Overwrite the parameters of one pipeline stage with the paper's initial values.

    Args:
        model: The bare GPTModel of this stage, before DDP takes over its storage. A tied embedding
            (``share_embeddings_and_output_weights``) gets the values of an output head.
        pg: Groups of this replica; only tensor-parallel rank and size are read.
        seed: Same on every rank and replica.
        std: Standard deviation of layer weights (0.02 in the paper's configuration).
        hidden_size: Width, for the head's scale.
        names: Names of the model's parameters.

    Raises:
        RuntimeMismatch: A matrix outside of the decoder layers that is no embedding or head.

    Source: facebookresearch/MuLoCo at commit 475bbf4; the table above `_HEAD_CUT` has each value.
    """
    _mark_split_weights(model)
    rank, size = pg.tp.rank(), pg.tp.size()
    tied = bool(getattr(model, "share_embeddings_and_output_weights", False))
    with torch.no_grad():
        for name, parameter in named_parameters(model, names):
            if parameter.dim() < 2:
                continue  # norms start at one
            dim = partition_dim(parameter)
            info = ParamInfo.from_name(name, tuple(parameter.shape), dim, names=names)
            shape = list(parameter.shape)
            if dim is not None:
                shape[dim] *= size
            generator = torch.Generator().manual_seed(_seed_of(name, seed))
            whole = _draw(
                info, shape, std=std, hidden_size=hidden_size, tied=tied, generator=generator
            )
            parameter.copy_(_local(info, whole, rank, size))


def _mark_split_weights(model: nn.Module) -> None:
    """Mark along which dimension each weight is split, as Megatron's initialisation would have.

    Megatron sets the mark only where it initialises a weight itself, which ``init: muloco`` and a
    resume turn off; without it, every rank would take the weight for a replicated tensor.
    """
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            dim = 1
        elif isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            dim = 0
        else:
            continue
        weight = module.weight
        if weight is not None and not hasattr(weight, "partition_dim"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _draw(
    info: ParamInfo,
    shape: list[int],
    *,
    std: float,
    hidden_size: int,
    tied: bool,
    generator: torch.Generator,
) -> Tensor:
    """Return the whole tensor, rows in the order in which one tensor-parallel rank holds them."""
    whole = torch.empty(shape, dtype=torch.float32)

    def truncated(tensor: Tensor, scale: float, cut: float) -> Tensor:
        return nn.init.trunc_normal_(tensor, std=scale, a=-cut, b=cut, generator=generator)

    if info.kind == "embedding" and not tied:
        return whole.normal_(generator=generator)
    if info.kind in ("embedding", "output"):
        scale = hidden_size**-0.5
        return truncated(whole, scale, _HEAD_CUT * scale)
    if info.layer is None:
        raise RuntimeMismatch(
            f"{info.name} is neither the embedding nor the output head nor in a decoder layer, so "
            "model.init: muloco has no scale for it. Use model.init: megatron."
        )
    deep = std / math.sqrt(2 * (info.layer + 1))
    if info.kind == "fc1":
        gate, up = whole.chunk(2)
        truncated(gate, std, _LAYER_CUT)
        truncated(up, deep, _LAYER_CUT)
        return whole
    return truncated(whole, deep if info.kind in ("proj", "fc2") else std, _LAYER_CUT)


def _local(info: ParamInfo, whole: Tensor, rank: int, size: int) -> Tensor:
    """Return the piece of tensor-parallel rank ``rank``.

    The fused gate/up matrix is cut in two places: every rank holds [its gate rows; its up rows].
    """
    if info.partition_dim is None:
        return whole
    if info.kind == "fc1":
        take: Callable[[Tensor], Tensor] = lambda half: half.chunk(size, dim=0)[rank]  # noqa: E731
        return torch.cat([take(half) for half in whole.chunk(2)])
    return whole.chunk(size, dim=info.partition_dim)[rank]


# ------------------------------------------------------------------------------------------
# Poison: values that a load has to overwrite.
#
# Drawing takes long for a large model, and a load overwrites every value. One that it missed must
# not pass for a weight, so memory that waits for a load is filled with one NaN whose bits no
# arithmetic makes. Any other NaN may have been saved: the guard sets back a replica that has some.

# The upper half of the fp32 bits are the bf16 bits, so poison is poison after a conversion to fp32.
_POISON = {torch.float32: (torch.int32, 0x7FDB0000), torch.bfloat16: (torch.int16, 0x7FDB)}


@torch.no_grad()
def poison(tensor: Tensor) -> Tensor:
    """Fill an fp32 or bf16 tensor with poison; return it."""
    bits, value = _POISON[tensor.dtype]
    tensor.detach().view(bits).fill_(value)
    return tensor


@torch.no_grad()
def has_poison(tensor: Tensor) -> bool:
    """Whether any element of an fp32 or bf16 tensor is still poison."""
    bits, value = _POISON[tensor.dtype]
    return bool((tensor.detach().view(bits) == value).any())


def poison_weights(model: nn.Module) -> None:
    """Poison every parameter of one pipeline stage that will be loaded.

    Args:
        model: The bare GPTModel of this stage, built with ``perform_initialization=False``.
    """
    _mark_split_weights(model)
    for parameter in model.parameters():
        poison(parameter)
