"""A model of Transformer Engine's layers has the parameters of the local one, and its loss."""

from typing import Any

import pytest
import torch

from megatron_muloco.config import RunConfig
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.model.build import build_model
from megatron_muloco.model.names import describe_parameters
from megatron_muloco.optim.matrices import LayerShape
from megatron_muloco.optim.parameter_table import build_parameter_table
from megatron_muloco.params import ParamInfo
from megatron_muloco.training.start import initialize_replicas
from tests.support.spawn import RankFailure, run_ranks
from tests.support.te_stub import transformer_engine_stub
from tests.support.tiny_models import finish_tiny, made_up_tokens, tiny_config

Described = tuple[list[ParamInfo], dict[str, torch.Tensor], dict[str, bool], float]


def _describe(config: RunConfig) -> Described:
    """Return infos, initial values and sequence-parallel marks of all parameters, and a loss."""
    groups = initialize_replicas(config)
    stage: Any = build_model(config, groups)
    rank, size = groups.pg.tp.rank(), groups.pg.tp.size()
    described = describe_parameters(stage, tensor_rank=rank)
    infos = [info for info, _ in described.values()]
    values = {name: value.detach().clone() for name, (_, value) in described.items()}
    marks = {
        name: bool(getattr(value, "sequence_parallel", False))
        for name, (_, value) in described.items()
    }
    tokens = made_up_tokens(0, config.model.seq_length + 1, config.model.vocab_size)[None]
    places = torch.arange(config.model.seq_length)[None]
    loss = float("nan")
    if size == 1:
        loss = float(stage(tokens[:, :-1], places, None, labels=tokens[:, 1:]).mean())
    finish_tiny()
    return infos, values, marks, loss


def _both(local: RunConfig, engine: RunConfig) -> tuple[Described, Described]:
    with transformer_engine_stub():
        stubbed = _describe(engine)
    return _describe(local), stubbed


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("post_layernorm", [True, False])
def test_parameters_and_loss_are_those_of_the_local_layers(
    tensor: int, post_layernorm: bool
) -> None:
    parallel = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    local, engine = (
        tiny_config(
            parallel=parallel,
            model={"transformer_impl": name, "post_layernorm": post_layernorm},
            training={"precision": "bf16"},
        )
        for name in ("local", "transformer_engine")
    )
    for ours, theirs in run_ranks(_both, tensor, local, engine):
        assert theirs[0] == ours[0]  # names, shapes, division, kinds: in the same order
        assert theirs[2] == ours[2]
        for name, value in ours[1].items():
            assert torch.equal(theirs[1][name], value), name
        if tensor == 1:
            assert theirs[3] == ours[3]
        tables = [
            build_parameter_table(
                described[0],
                LayerShape.from_config(local.model),
                kind="muon",
                tensor_size=tensor,
                group_size=tensor,
            )
            for described in (ours, theirs)
        ]
        assert tables[0].rows == tables[1].rows


def test_without_the_package_the_key_is_refused() -> None:
    config = tiny_config(model={"transformer_impl": "transformer_engine"})
    with pytest.raises(RankFailure, match=RuntimeMismatch.__name__) as caught:
        run_ranks(_describe, 1, config)
    assert "Transformer Engine cannot be imported" in str(caught.value)
