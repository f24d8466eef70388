"""The digest of a model: the same for every cut, another for every change."""

import pytest
import torch
from torch import Tensor

from megatron_muloco.checkpoint.sharding import Cut, digest_sum, render, whole_index
from megatron_muloco.params import ParamInfo, Shard

FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
QKV = "decoder.layers.0.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.0.self_attention.linear_proj.weight"
NORM = "decoder.final_layernorm.weight"
# name -> whole shape, partition dim. 8 query groups' rows, gate and up of 8 rows each.
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    FC1: ((16, 6), 0),
    QKV: ((24, 6), 0),
    PROJ: ((6, 8), 1),
    NORM: ((7,), None),
}


def whole_model() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, (shape, _) in SHAPES.items()}


def local_piece(name: str, whole: Tensor, rank: int, size: int) -> Tensor:
    """Cut as Megatron does: rows of gate and of up separately, everything else straight."""
    dim = SHAPES[name][1]
    if dim is None:
        return whole
    if name == FC1:
        gate, up = whole.chunk(2)
        return torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
    return whole.chunk(size, dim=dim)[rank]


def pieces(model: dict[str, Tensor], tp: int, dp: int) -> list[list[tuple[Shard, Tensor]]]:
    """Return the shards of every (tp, dp) rank, tensor-parallel rank first."""
    ranks = []
    for tensor_rank in range(tp):
        for data_rank in range(dp):
            held = []
            for name, whole in model.items():
                local = local_piece(name, whole, tensor_rank, tp)
                dim = SHAPES[name][1]
                primary = dim is not None or tensor_rank == 0
                info = ParamInfo.from_name(name, tuple(local.shape), dim, is_primary=primary)
                edges = [local.numel() * i // dp for i in range(dp + 1)]
                start, end = edges[data_rank], edges[data_rank + 1]
                held.append((Shard(info, start, end), local.reshape(-1)[start:end]))
            ranks.append(held)
    return ranks


def digest(model: dict[str, Tensor], tp: int = 1, dp: int = 1) -> str:
    total = torch.zeros(1, dtype=torch.int64)
    for number, held in enumerate(pieces(model, tp, dp)):
        rank = number // dp
        total += digest_sum(held, tensor_rank=rank, tensor_size=tp, device=torch.device("cpu"))
    return render(int(total))


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_every_cut_has_the_same_digest(tp: int, dp: int) -> None:
    model = whole_model()
    assert digest(model, tp, dp) == digest(model)


@pytest.mark.parametrize("name", SHAPES)
def test_the_index_is_the_place_in_the_whole_parameter(name: str) -> None:
    shape, dim = SHAPES[name]
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    for rank in range(2):
        local = local_piece(name, whole, rank, 2)
        cut = Cut(ParamInfo.from_name(name, tuple(local.shape), dim), rank, 2)
        assert torch.equal(whole_index(cut, torch.arange(local.numel())), local.reshape(-1))


def test_any_flipped_bit_changes_it() -> None:
    model = whole_model()
    seen = {digest(model)}
    for name, whole in model.items():
        for bit in range(32):
            changed = whole.clone()
            changed.view(torch.int32).view(-1)[bit % whole.numel()] ^= (
                1 << bit if bit < 31 else -(1 << 31)
            )
            seen.add(digest({**model, name: changed}))
    assert len(seen) == 1 + 32 * len(model)


def test_order_and_name_matter() -> None:
    model = whole_model()
    swapped = model[NORM].flip(0)
    assert digest({**model, NORM: swapped}) != digest(model)
    zeros = {name: torch.zeros_like(whole) for name, whole in model.items()}
    assert len({digest({name: whole}) for name, whole in zeros.items()}) == len(model)


def test_it_is_sixteen_digits() -> None:
    assert len(digest(whole_model())) == 16
    assert render(-1) == "f" * 16


def test_long_shards_are_visited_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = whole_model()
    expected = digest(model, tp=2, dp=2)
    monkeypatch.setattr("megatron_muloco.checkpoint.sharding._CHUNK", 5)
    assert digest(model, tp=2, dp=2) == expected
