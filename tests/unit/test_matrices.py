"""Units: Megatron's fused tensors come apart into q, k, v, gate and up, at every tensor size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_muloco.errors import RuntimeMismatch, TopologyError
from megatron_muloco.optim.matrices import (
    LayerShape,
    MuonMatrix,
    check_rows,
    newton_schulz_flops,
    route,
    split,
)
from megatron_muloco.optim.parameter_table import assign
from megatron_muloco.optim.routing import by_shape
from megatron_muloco.params import ParamInfo

HIDDEN = 6
QKV = "decoder.layers.3.self_attention.linear_qkv.weight"
PROJ = "decoder.layers.3.self_attention.linear_proj.weight"
FC1 = "decoder.layers.3.mlp.linear_fc1.weight"
FC2 = "decoder.layers.3.mlp.linear_fc2.weight"
MHA = LayerShape(4, 4, 3, 8)
GQA = LayerShape(8, 4, 3, 12)


def local_pieces(name: str, layer: LayerShape, tensor_size: int) -> tuple[ParamInfo, list[Tensor]]:
    """Build what Megatron holds, from separate matrices whose elements say who they are."""
    d, ffn = layer.kv_channels, layer.ffn_hidden_size
    nq, nkv = layer.num_attention_heads, layer.num_query_groups
    whole = whole_matrices(name, layer)
    if name == QKV:
        q, k, v = (whole[kind].view(nkv, -1, HIDDEN) for kind in "qkv")
        fused = torch.cat([q, k, v], dim=1).reshape((nq + 2 * nkv) * d, HIDDEN)
        pieces = fused.chunk(tensor_size, dim=0)
    elif name == FC1:
        gates, ups = (whole[kind].view(tensor_size, -1, HIDDEN) for kind in ("gate", "up"))
        pieces = tuple(torch.cat([gate, up]) for gate, up in zip(gates, ups, strict=True))
        assert pieces[0].shape[0] == 2 * ffn // tensor_size
    else:
        (tensor,) = whole.values()
        pieces = tensor.chunk(tensor_size, dim=1)
    dim = 0 if name in (QKV, FC1) else 1
    return ParamInfo.from_name(name, tuple(pieces[0].shape), dim), list(pieces)


def whole_matrices(name: str, layer: LayerShape) -> dict[str, Tensor]:
    d, ffn = layer.kv_channels, layer.ffn_hidden_size
    nq, nkv = layer.num_attention_heads, layer.num_query_groups
    shapes = {
        QKV: {"q": (nq * d, HIDDEN), "k": (nkv * d, HIDDEN), "v": (nkv * d, HIDDEN)},
        PROJ: {"proj": (HIDDEN, nq * d)},
        FC1: {"gate": (ffn, HIDDEN), "up": (ffn, HIDDEN)},
        FC2: {"down": (HIDDEN, ffn)},
    }[name]
    return {
        kind: (1000.0 * i + torch.arange(rows * columns)).view(rows, columns)
        for i, (kind, (rows, columns)) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("layer", [MHA, GQA], ids=["mha", "gqa"])
@pytest.mark.parametrize("name", [QKV, PROJ, FC1, FC2])
def test_units_are_the_separate_matrices(name: str, layer: LayerShape, tensor_size: int) -> None:
    param, pieces = local_pieces(name, layer, tensor_size)
    matrices = split(param, layer, tensor_size=tensor_size)
    expected = whole_matrices(name, layer)
    assert [matrix.kind for matrix in matrices] == list(expected)
    for matrix in matrices:
        per_rank = [torch.cat([piece[a:b] for a, b in matrix.local_rows]) for piece in pieces]
        whole = torch.cat(per_rank, dim=matrix.partition_dim)
        assert matrix.shape == tuple(whole.shape)
        assert torch.equal(whole, expected[matrix.kind])
        assert matrix.name == f"{name}::{matrix.kind}"


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
@pytest.mark.parametrize("name", [QKV, PROJ, FC1, FC2])
def test_units_partition_the_rows(name: str, tensor_size: int) -> None:
    param, _ = local_pieces(name, GQA, tensor_size)
    matrices = split(param, GQA, tensor_size=tensor_size)
    rows = [row for matrix in matrices for a, b in matrix.local_rows for row in range(a, b)]
    assert sorted(rows) == list(range(param.local_shape[0]))
    assert sum(matrix.numel for matrix in matrices) == param.numel * tensor_size


def test_a_parameter_without_partition_dim_is_whole_on_one_tensor_rank_only() -> None:
    param = ParamInfo.from_name(PROJ, (6, 12), None)
    (matrix,) = split(param, MHA, tensor_size=1)
    assert matrix.shape == (6, 12)
    with pytest.raises(RuntimeMismatch, match="the same on all 2 tensor-parallel ranks"):
        split(param, MHA, tensor_size=2)


def test_query_groups_must_divide_over_tensor_ranks() -> None:
    with pytest.raises(TopologyError, match=r"the 4 query groups of .* do not divide over 3"):
        split(ParamInfo.from_name(QKV, (12, HIDDEN), 0), MHA, tensor_size=3)


def test_a_module_of_other_size_is_refused() -> None:
    with pytest.raises(RuntimeMismatch, match="has 35 local rows"):
        split(ParamInfo.from_name(QKV, (35, HIDDEN), 0), MHA, tensor_size=1)


@pytest.mark.parametrize(
    "pieces",
    [[((0, 2),), ((3, 4),)], [((0, 3),), ((2, 4),)], [((0, 3),)], [((0, 5),)], []],
    ids=["gap", "overlap", "short", "long", "none"],
)
def test_rows_that_are_no_partition_are_refused(pieces: list[tuple[tuple[int, int], ...]]) -> None:
    with pytest.raises(RuntimeMismatch, match="do not contain each of them once"):
        check_rows(ParamInfo.from_name(PROJ, (4, 2), 1), pieces)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (QKV, (8, 8), "matrix"),
        (FC2, (8, 8), "matrix"),
        ("embedding.word_embeddings.weight", (8, 8), "vector"),
        ("output_layer.weight", (8, 8), "vector"),
        ("decoder.layers.0.input_layernorm.weight", (8,), "vector"),
        ("decoder.layers.0.self_attention.q_layernorm.weight", (2,), "vector"),
        ("decoder.layers.0.self_attention.linear_proj.post_norm.weight", (8,), "vector"),
        ("decoder.layers.0.mlp.linear_fc1.bias", (8,), "vector"),
    ],
)
def test_routes(name: str, shape: tuple[int, ...], expected: str) -> None:
    to, reason = route(ParamInfo.from_name(name, shape, None))
    assert to == expected
    assert reason


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("embedding.position_embeddings.weight", (8, 8)),
        ("decoder.layers.0.mlp.router.weight", (4, 8)),
        ("decoder.layers.0.mlp.linear_fc1.weight.extra", (4, 8)),
        (FC1, (2, 4, 8)),
    ],
)
def test_an_unknown_matrix_is_refused_and_never_given_to_adamw(
    name: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(RuntimeMismatch, match="neither a known decoder matrix nor"):
        route(ParamInfo.from_name(name, shape, None))


def test_cost_is_that_of_the_products() -> None:
    # (20 r + 10) m^3 for five steps with r = n / m, the count for square and for ratio 3
    assert newton_schulz_flops(4, 4, 5) == 30 * 4**3
    assert newton_schulz_flops(12, 4, 5) == newton_schulz_flops(4, 12, 5) == 70 * 4**3


def test_cost_of_the_symmetric_forms() -> None:
    # With r = n / m: (15 r + 5) m^3 by halves, (9 r + 11) m^3 in pairs, for five steps
    for r in (1, 3):
        assert newton_schulz_flops(4 * r, 4, 5, "triangle") == (15 * r + 5) * 4**3
        assert newton_schulz_flops(4 * r, 4, 5, "gram") == (9 * r + 11) * 4**3
        # One step alone, and after an odd number of others one that is left over
        assert newton_schulz_flops(4, 4 * r, 1, "gram") == (3 * r + 1) * 4**3
        assert newton_schulz_flops(4, 4 * r, 4, "gram") == (9 * r + 7) * 4**3


def test_a_unit_is_as_dear_as_the_form_that_its_shape_gets() -> None:
    param, _ = local_pieces(QKV, GQA, 2)
    q, k, v = split(
        param, GQA, tensor_size=2, choose_impl=lambda m, n: "gram" if m > n else "triangle"
    )
    assert (q.shape, q.ns_impl, q.cost) == ((24, 6), "gram", newton_schulz_flops(24, 6, 5, "gram"))
    assert k.ns_impl == v.ns_impl == "gram"
    (proj,) = split(
        ParamInfo.from_name(PROJ, (6, 12), 1),
        GQA,
        tensor_size=2,
        steps=3,
        choose_impl=lambda m, n: "gram" if m > n else "triangle",
    )
    assert (proj.ns_impl, proj.cost) == ("triangle", newton_schulz_flops(6, 24, 3, "triangle"))


def test_heads_cost_as_much_as_so_many_small_matrices() -> None:
    param, _ = local_pieces(QKV, GQA, 2)
    q, k, v = split(param, GQA, tensor_size=2, split_heads=True)
    assert (q.blocks, k.blocks, v.blocks) == (8, 4, 4)
    for matrix in (q, k, v):
        assert matrix.block_shape == (GQA.kv_channels, HIDDEN)
        assert matrix.cost == matrix.blocks * newton_schulz_flops(GQA.kv_channels, HIDDEN, 5)
    assert [matrix.shape for matrix in (q, k, v)] == [
        matrix.shape for matrix in split(param, GQA, tensor_size=2)
    ]
    (proj,) = split(ParamInfo.from_name(PROJ, (6, 12), 1), GQA, tensor_size=2, split_heads=True)
    assert proj.blocks == 1


def test_heads_are_not_batched_with_whole_matrices() -> None:
    # With as many heads as groups and width 12, q, k, v and proj have one shape.
    params = [ParamInfo.from_name(QKV, (36, 12), 0), ParamInfo.from_name(PROJ, (12, 12), 1)]
    matrices = [u for p in params for u in split(p, MHA, tensor_size=1, split_heads=True)]
    assert [[matrix.kind for matrix in batch] for batch in by_shape(matrices)] == [
        ["q", "k", "v"],
        ["proj"],
    ]


def units_of_cost(*costs: int) -> list[MuonMatrix]:
    return [
        MuonMatrix(f"p{i}::x", f"p{i}", "x", ((0, 1),), 1, 0, 1, c) for i, c in enumerate(costs)
    ]


def test_assignment_shares_the_busiest_ranks_units_anew() -> None:
    # The heaviest first: 5 + 4, 5 + 3 + 3. Better: 5 + 5, 3 + 4 + 3.
    assignment = assign(units_of_cost(3, 5, 5, 4, 3), 2)
    assert assignment.loads == (10, 10)
    assert assignment.balance == 1.0
    assert assignment.owners in ((0, 1, 1, 0, 0), (1, 0, 0, 1, 1))


@given(st.lists(st.integers(1, 20), max_size=14), st.integers(1, 5))
def test_assignment_is_whole_and_repeatable(costs: list[int], ranks: int) -> None:
    assignment = assign(units_of_cost(*costs), ranks)
    assert assignment == assign(units_of_cost(*costs), ranks)
    loads = [0] * ranks
    for cost, owner in zip(costs, assignment.owners, strict=True):
        loads[owner] += cost
    assert assignment.loads == tuple(loads)
    # Every greedy schedule is within one matrix of the mean, and refining lowers the largest load.
    assert max(loads) <= sum(costs) / ranks + max(costs, default=0)


def test_assignment_with_fewer_units_than_ranks_leaves_ranks_idle() -> None:
    assignment = assign(units_of_cost(1), 3)
    assert assignment.loads == (1, 0, 0)
    assert assign([], 2).balance == 1.0
