"""One model, one stream of samples: what must not depend on how the world is cut."""

from functools import partial

import pytest
import torch

from tests.support.spawn import run_ranks
from tests.support.tiny_models import (
    ADAMW,
    MUON,
    finish_tiny,
    start_tiny,
    tiny_config,
)

STEPS = 4
INNER = {"muon": MUON, "adamw": ADAMW}
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
    "cp2": {"context_parallel_size": 2},
    "tp2-pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
}
# Pipelines of four layers, all of which train alike.
PIPELINES = {
    "2+2": {"pipeline_model_parallel_size": 2},
    "3+1": {"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1},
    "1+2+1": {
        "pipeline_model_parallel_size": 3,
        "num_layers_in_first_pipeline_stage": 1,
        "num_layers_in_last_pipeline_stage": 1,
    },
}


def _losses(inner: str, parallel: dict[str, int], sections: dict[str, dict[str, object]]):
    config = tiny_config(inner=INNER[inner], parallel=parallel, **sections)
    run = start_tiny(config).train(STEPS)
    finish_tiny()
    return run.losses, run.grad_norms


def _world(layout: str) -> int:
    sizes = [size for key, size in LAYOUTS[layout].items() if key.endswith("_size")]
    return 2 if layout == "dp2" else int(torch.tensor(sizes).prod())


# fp32 sums of at most 60 * 16 * 8 terms in another order: each relative rounding error is at most
# 2^-24 and grows like the square root of the number of terms, 88; four steps of training with an
# inner learning rate of 0.02 amplify a difference of parameters by less than 2 a step.
RELATIVE = 16 * 88 * 2.0**-24


@pytest.mark.parametrize("inner", ["muon", "adamw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_does_not_change_the_training(layout: str, inner: str) -> None:
    """Relation 5: losses and gradient norms agree between TP1/TP2, PP1/PP2 and DP1/DP2."""
    (one,) = run_ranks(partial(_losses, inner, {}, {}), 1)
    ranks = run_ranks(partial(_losses, inner, LAYOUTS[layout], {}), _world(layout))
    for losses, norms in ranks:
        assert losses == pytest.approx(one[0], rel=RELATIVE)
        assert norms == pytest.approx(one[1], rel=RELATIVE)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_split_of_the_layers_does_not_change_the_training(name: str) -> None:
    pipeline = {"num_replicas": 2} | PIPELINES[name]
    model = {"model": {"num_layers": 4}}
    one = run_ranks(partial(_losses, "muon", {"num_replicas": 2}, model), 2)
    world = 2 * PIPELINES[name]["pipeline_model_parallel_size"]
    for rank, (losses, norms) in enumerate(
        run_ranks(partial(_losses, "muon", pipeline, model), world)
    ):
        expected = one[rank // (world // 2)]
        assert losses == pytest.approx(expected[0], rel=RELATIVE)
        assert norms == pytest.approx(expected[1], rel=RELATIVE)


def _losses_of_documents(parallel: dict[str, int], precision: str) -> list[float]:
    config = tiny_config(inner=MUON, parallel=parallel, training={"precision": precision})
    run = start_tiny(config, end_of_document=5).train(STEPS)
    finish_tiny()
    return run.losses


@pytest.mark.parametrize(
    "layout",
    [
        {"context_parallel_size": 2},
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
        {
            "context_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
        },
        {"context_parallel_size": 4},
    ],
    ids=["cp2", "cp2-pp2", "cp2-tp2-sp", "cp4"],
)
def test_context_parallel_ranks_attend_inside_documents(layout: dict[str, int]) -> None:
    replicas = {"num_replicas": 2 if len(layout) == 1 else 1}
    one = run_ranks(_losses_of_documents, replicas["num_replicas"], replicas, "fp32")
    size = 2 if layout == {"context_parallel_size": 2} else 4
    ranks = run_ranks(
        _losses_of_documents, size * replicas["num_replicas"], replicas | layout, "fp32"
    )
    for rank, losses in enumerate(ranks):
        assert losses == pytest.approx(one[rank // size], rel=RELATIVE)
