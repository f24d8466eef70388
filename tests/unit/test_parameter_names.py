"""Names say what a parameter is, by one table; another architecture passes another table."""

import pytest
from torch import nn

from megatron_muloco.compress.codecs import format_of
from megatron_muloco.compress.format import RawFormat
from megatron_muloco.config.outer import LinearCompression
from megatron_muloco.model.names import describe_parameters
from megatron_muloco.optim.matrices import LayerShape, route, split
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.params import GPT_NAMES, ParameterNames, ParamInfo, ParamKind

LAYER = "decoder.layers.17."


@pytest.mark.parametrize(
    ("name", "kind", "layer"),
    [
        ("embedding.word_embeddings.weight", "embedding", None),
        ("output_layer.weight", "output", None),
        ("decoder.final_layernorm.weight", "norm", None),
        (LAYER + "input_layernorm.weight", "norm", 17),
        (LAYER + "self_attention.q_layernorm.weight", "norm", 17),
        (LAYER + "self_attention.linear_proj.post_norm.weight", "norm", 17),
        (LAYER + "self_attention.linear_qkv.weight", "qkv", 17),
        (LAYER + "self_attention.linear_proj.weight", "proj", 17),
        (LAYER + "mlp.linear_fc1.weight", "fc1", 17),
        (LAYER + "mlp.linear_fc2.weight", "fc2", 17),
        (LAYER + "mlp.linear_fc1.bias", None, 17),
        (LAYER + "mlp.router.weight", None, 17),
        ("embedding.position_embeddings.weight", None, None),
        ("encoder.layers.0.mlp.linear_fc1.weight", None, None),
        ("decoder.layers.first.mlp.linear_fc1.weight", None, None),
    ],
)
def test_the_name_says_kind_and_layer(name: str, kind: ParamKind | None, layer: int | None) -> None:
    info = ParamInfo.from_name(name, (4, 4), 0)
    assert (info.kind, info.layer) == (kind, layer)


def test_a_name_is_put_together_as_it_is_taken_apart() -> None:
    assert GPT_NAMES.layer_of(LAYER + "mlp.linear_fc1.weight") == (17, "mlp.linear_fc1.weight")
    assert GPT_NAMES.in_layer(17, "mlp.linear_fc1.weight") == LAYER + "mlp.linear_fc1.weight"


OTHER_NAMES = ParameterNames(
    layers="blocks",
    embedding="tokens.weight",
    output="head.weight",
    matrices={"attend.weight": "qkv", "merge.weight": "proj", "open.weight": "fc1"},
    norm="scale",
)


PARTS = ("attend", "merge", "open")


class Block(nn.Module):
    """Layer ``number`` (from 1) of width 8 with 2 heads of 4."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.layer_number = number
        self.scale = nn.RMSNorm(8)
        self.attend = nn.Linear(8, 24, bias=False)
        self.merge = nn.Linear(8, 8, bias=False)
        self.open = nn.Linear(8, 12, bias=False)


class LastStage(nn.Module):
    """Layers 3 and 4 of a model, as its second pipeline stage holds them, with a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.pre_process = False
        self.share_embeddings_and_output_weights = True
        self.blocks = nn.ModuleList([Block(3), Block(4)])
        self.last_scale = nn.RMSNorm(8)
        self.head = nn.Linear(8, 16, bias=False)


def test_an_architecture_with_other_names_needs_another_table_only() -> None:
    described = describe_parameters(LastStage(), tensor_rank=0, names=OTHER_NAMES)
    infos = {name: info for name, (info, _) in described.items()}
    assert list(infos) == [
        *(f"blocks.{n}.{part}.weight" for n in (2, 3) for part in ("scale", *PARTS)),
        "last_scale.weight",
        "tokens.weight",  # the tied head repeats the embedding
    ]
    assert [name for name, info in infos.items() if not info.is_primary] == ["tokens.weight"]
    assert {info.layer for info in infos.values()} == {2, 3, None}
    to_muon = [name for name, info in infos.items() if route(info)[0] == "matrix"]
    assert to_muon == [f"blocks.{n}.{part}.weight" for n in (2, 3) for part in PARTS]
    shape = LayerShape(2, 2, 4, 6)
    kinds = [m.kind for name in to_muon for m in split(infos[name], shape, tensor_size=1)]
    assert kinds == ["q", "k", "v", "proj", "gate", "up"] * 2
    plan = FragmentPlan.by_layer(infos.values(), num_layers=4, count=4)
    assert [len(names) for names in plan.fragments] == [1, 0, 4, 5]
    assert plan.fragments[0] == ("tokens.weight",)
    code = LinearCompression(
        kind="linear",
        bits=4,
        exceptions={"norm": "none"},
    )
    raw = [n for n, info in infos.items() if isinstance(format_of(code, info.kind), RawFormat)]
    assert raw == ["blocks.2.scale.weight", "blocks.3.scale.weight", "last_scale.weight"]
