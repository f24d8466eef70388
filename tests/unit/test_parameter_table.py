"""The parameter table: every parameter once, with its route, matrices, owners and share of cost."""

import sys
from dataclasses import replace

import pytest

from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.optim.matrices import LayerShape
from megatron_muloco.optim.parameter_table import (
    ParameterTable,
    build_parameter_table,
    parameter_report,
)
from megatron_muloco.params import ParamInfo
from tests.support.scattered import matrix_params

LAYER = LayerShape(8, 4, 4, 24)
HIDDEN = 32


def stage_params(tensor_size: int, layers: int = 2) -> list[ParamInfo]:
    layer = matrix_params(LAYER, HIDDEN, tensor_size)
    params = [
        replace(param, name=param.name.replace("layers.0", f"layers.{i}"))
        for i in range(layers)
        for param in layer
    ]
    vocabulary = (64 // tensor_size, HIDDEN)
    return [
        ParamInfo.from_name("embedding.word_embeddings.weight", vocabulary, 0),
        *params,
        ParamInfo.from_name("decoder.final_layernorm.weight", (HIDDEN,), None),
        ParamInfo.from_name("output_layer.weight", vocabulary, 0),
    ]


def table_of(tensor_size: int, group_size: int, **options: object) -> ParameterTable:
    return build_parameter_table(
        stage_params(tensor_size),
        LAYER,
        **({"kind": "muon", "tensor_size": tensor_size, "group_size": group_size} | options),
    )


def test_each_parameter_has_one_row_and_each_unit_one_owner() -> None:
    table = table_of(2, 6)
    assert [row.name for row in table.rows] == [param.name for param in stage_params(2)]
    assert len(table.matrices) == len(table.owners) == 2 * 7
    owned = [name for rank in range(6) for name in table.owned_by(rank)]
    assert sorted(owned) == sorted(matrix.name for matrix in table.matrices)
    for row in table.rows:
        assert bool(row.matrices) == (row.route == "matrix")
        assert len(row.owners) == len(row.matrices)
        assert row.reason


def test_costs_add_up() -> None:
    table = table_of(2, 4)
    assert sum(row.cost_share for row in table.rows) == pytest.approx(1.0)
    assert sum(table.assignment.loads) == sum(matrix.cost for matrix in table.matrices)
    assert table.assignment.balance >= 1.0


@pytest.mark.parametrize("tensor_size", [1, 2, 4])
def test_whole_shapes_and_costs_do_not_depend_on_the_tensor_size(tensor_size: int) -> None:
    table, reference = table_of(tensor_size, 4), table_of(1, 4)
    assert [row.shape for row in table.rows] == [row.shape for row in reference.rows]
    assert [matrix.cost for matrix in table.matrices] == [
        matrix.cost for matrix in reference.matrices
    ]
    assert table.owners == reference.owners


def test_kind_adamw_routes_everything_to_adamw() -> None:
    table = table_of(1, 2, kind="adamw")
    assert set(table.routes.values()) == {"vector"}
    assert table.matrices == ()
    assert table.owned_by(0) == ()
    assert "0 matrix parameters with 0 matrices, 11 vector parameters" in table.render()


def test_rendering_shows_every_parameter_unit_owner_and_the_totals() -> None:
    text = table_of(1, 3, multipliers={"output_layer.weight": (0.5, 0.0)}).render()
    lines = text.splitlines()
    assert len(lines) == 1 + 11 + 1
    qkv = next(line for line in lines if "layers.1.self_attention.linear_qkv" in line)
    for part in (
        "matrix",
        "q [32 x 32] plain @",
        "k [16 x 32] plain @",
        "v [16 x 32] plain @",
        "64 x 32",
    ):
        assert part in qkv
    output = next(line for line in lines if line.startswith("output_layer"))
    assert "vector" in output
    assert "0.5  0 " in output
    assert "8 matrix parameters with 14 matrices, 3 vector parameters" in lines[-1]
    assert "balance (max/mean) " in lines[-1]


def test_names_are_unique_and_multipliers_name_parameters() -> None:
    params = stage_params(1)
    options = {"kind": "muon", "tensor_size": 1, "group_size": 1}
    with pytest.raises(RuntimeMismatch, match=r"repeated: \['output_layer.weight'\]"):
        build_parameter_table([*params, params[-1]], LAYER, **options)
    with pytest.raises(RuntimeMismatch, match=r"does not have: \['output.weight'\]"):
        build_parameter_table(params, LAYER, **options, multipliers={"output.weight": (1, 1)})


def test_an_unknown_matrix_is_refused_with_muon_and_accepted_with_adamw() -> None:
    router = ParamInfo.from_name("decoder.layers.0.mlp.router.weight", (4, HIDDEN), None)
    options = {"tensor_size": 1, "group_size": 1}
    with pytest.raises(RuntimeMismatch, match="router"):
        build_parameter_table([router], LAYER, kind="muon", **options)
    assert build_parameter_table([router], LAYER, kind="adamw", **options).matrices == ()


@pytest.mark.parametrize(
    ("tensor_size", "data_size", "layers", "bar"),
    [(4, 16, 54, 1.06), (4, 8, 27, 1.06), (4, 16, 27, 1.17)],
    ids=["tp4-dp16-pp1", "tp4-dp8-pp2", "tp4-dp16-pp2"],
)
def test_balance_at_15b(tensor_size: int, data_size: int, layers: int, bar: float) -> None:
    layer = LayerShape(36, 36, 128, 12672)
    params = [
        replace(param, name=param.name.replace("layers.0", f"layers.{i}"))
        for i in range(layers)
        for param in matrix_params(layer, 4608, tensor_size)
    ]
    table = build_parameter_table(
        params, layer, kind="muon", tensor_size=tensor_size, group_size=tensor_size * data_size
    )
    assert table.assignment.balance <= bar


def test_planning_needs_no_torch() -> None:
    import subprocess

    code = (
        "import sys; import megatron_muloco.optim.parameter_table, megatron_muloco.optim.routing;"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_report_shows_every_stage_and_says_how_much_is_muon() -> None:
    stages = [table_of(1, 3), table_of(1, 3)]
    report = parameter_report(stages)
    assert all(table.render() in report.table for table in stages)
    assert "pipeline stage 1 of 2" in report.table
    assert report.summary.startswith("16 by Muon with 28 matrices, 6 by AdamW; Newton-Schulz")
    assert "over 6 ranks" in report.summary
    assert "\n" not in report.summary
    plain = parameter_report([table_of(1, 3, kind="adamw")])
    assert plain.summary == "11 by AdamW"


def test_rendering_says_where_heads_are_split() -> None:
    text = table_of(2, 2, split_heads=True).render()
    for part in ("q 8 * [4 x 32] plain @", "k 4 * [4 x 32] plain @", "proj [32 x 32] plain @"):
        assert part in text
