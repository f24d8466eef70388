"""What the real stack checks, leaves out and reports about replicas around an outer step."""

import math
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_muloco.comm.consistency import check_same_shards
from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import sketch_width
from megatron_muloco.errors import RuntimeMismatch, SyncError
from megatron_muloco.model.build import build_model
from megatron_muloco.outer.diagnostics import FragmentReport, cosines
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.topology import Topology
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import finish_tiny, same_for_all_replicas, start_tiny, tiny_config


def config_of(replicas: int, **sections: Any) -> RunConfig:
    parallel = {"num_replicas": replicas, **sections.pop("parallel", {})}
    training = {"global_batch_size": 4 * replicas, **sections.pop("training", {})}
    return tiny_config(parallel=parallel, training=training, **sections)


# ---- digests ---------------------------------------------------------------------------------


def _with_a_flipped_bit(config: RunConfig) -> tuple[int, str]:
    """Flip one bit of replica 1's anchor after step 1; return the last step and the error."""
    run = start_tiny(config).train(1)
    assert run.optimizer.synchronizer is not None
    if run.groups.coords.replica == 1:
        anchor = run.optimizer.synchronizer.anchors()["decoder.final_layernorm.weight"]
        anchor.view(torch.int32)[3] ^= 1
    message = ""
    try:
        while run.optimizer.steps < 8:
            run.train(1)
        run.optimizer.flush()
    except SyncError as error:
        message = str(error)
    finish_tiny()
    return run.optimizer.steps, message


DIGESTS: dict[str, tuple[dict[str, Any], int, int]] = {  # monitor, round and step that notice
    "debug": ({"debug_digests": True, "digest_interval": 0}, 1, 2),
    "every-other-round": ({"digest_interval": 2}, 2, 4),
    "at-the-end": ({"digest_interval": 100}, 4, 8),
}


@pytest.mark.parametrize("case", DIGESTS)
def test_a_flipped_bit_is_found_and_named(case: str) -> None:
    monitor, round_index, step = DIGESTS[case]
    for noticed, message in run_ranks(_with_a_flipped_bit, 2, config_of(2, monitor=monitor)):
        assert noticed == step
        assert message.startswith(
            f"round {round_index}: the anchor of decoder.final_layernorm.weight differs between "
            "ranks (ranks [0] against [1]); 1 parameters of"
        )


def _with_a_flipped_momentum(config: RunConfig) -> str:
    """Flip one bit of replica 1's outer momentum after a round; return the error of the next."""
    run = start_tiny(config).train(3)
    assert run.optimizer.synchronizer is not None
    if run.groups.coords.replica == 1:
        momentum = run.optimizer.synchronizer.momenta()["decoder.final_layernorm.weight"]
        momentum.view(torch.int32)[3] ^= 1 << 20
    message = ""
    try:
        run.train(1)
    except SyncError as error:
        message = str(error)
    finish_tiny()
    return message


def test_a_replica_outside_the_majority_is_suspect() -> None:
    # Anchor and momentum of a round differ together; with lr 0 the anchor would not move.
    outer = {"kind": "nesterov", "lr": 1e-30, "momentum": 0.6, "sync_interval": 2}
    config = config_of(3, outer=outer, monitor={"digest_interval": 1})
    for message in run_ranks(_with_a_flipped_momentum, 3, config):
        assert message.startswith(
            "round 2: the outer momentum of decoder.final_layernorm.weight differs between ranks "
            "(ranks [0, 2] against [1]; suspect: [1]); 1 parameters of"
        )


def test_without_digests_nothing_is_compared() -> None:
    config = config_of(2, monitor={"digest_interval": 0})
    assert run_ranks(_with_a_flipped_bit, 2, config) == [(8, ""), (8, "")]


def _drifted_copy(config: RunConfig) -> str:
    """Change a norm on tensor-parallel rank 1 after its fragment was applied."""
    run = start_tiny(config).train(2)
    if run.groups.coords.tp == 1:
        run.optimizer.view.masters["decoder.final_layernorm.weight"][0] += 1.0
    message = ""
    try:
        run.optimizer._checks._replicated.check(1)
    except SyncError as error:
        message = str(error)
    finish_tiny()
    return message


def test_a_copy_that_drifted_is_found_and_named() -> None:
    config = config_of(1, parallel={"tensor_model_parallel_size": 2})
    holder, copy = run_ranks(_drifted_copy, 2, config)
    assert holder == ""
    assert copy.startswith(
        "round 1: decoder.final_layernorm.weight: rank 1 holds other values than rank 0"
    )


def test_norm_weights_that_drift_are_compared_right_after_their_broadcast() -> None:
    """A change between outer steps is overwritten by the next broadcast, so it is no error."""
    config = config_of(
        1, parallel={"tensor_model_parallel_size": 2}, monitor={"digest_interval": 1}
    )
    assert run_ranks(_changed_between_rounds, 2, config) == ["", ""]


def _changed_between_rounds(config: RunConfig) -> str:
    run = start_tiny(config).train(3)
    if run.groups.coords.tp == 1:
        run.optimizer.view.masters["decoder.final_layernorm.weight"][0] += 1e-6
    try:
        run.train(1)
    except SyncError as error:
        return str(error)
    finally:
        finish_tiny()
    return ""


# ---- weights inside a replica ----------------------------------------------------------------


def _with_a_changed_weight(config: RunConfig, where: str) -> str:
    """Change a weight of rank 1 in the middle of step 2; return the error of its check."""
    run = start_tiny(config).train(1)
    optimizer = run.optimizer
    step = optimizer._distributed.step_with_ready_grads
    name = "decoder.final_layernorm.weight"

    def changed() -> Any:
        done = step()
        view = optimizer.view
        held = {"parameter": view.parameters(), "masters": view.masters}
        if dist.get_rank() == 1 and where in held:
            with torch.no_grad():
                for tensor in chosen(held[where]):
                    tensor.view(-1)[0] += 1.0
        return done

    def chosen(tensors: Any) -> list[torch.Tensor]:
        return [tensors[name]] if where == "parameter" else list(tensors.values())

    optimizer._distributed.step_with_ready_grads = changed
    try:
        run.train(1)
    except SyncError as error:
        return str(error)
    finally:
        finish_tiny()
    return ""


def weights_config(**training: Any) -> RunConfig:
    interval = {"check_weight_hash_across_dp_replicas_interval": 2}
    outer = {"kind": "none"}
    return config_of(1, outer=outer, training={"precision": "bf16", **interval, **training})


def test_a_parameter_that_differs_between_data_parallel_ranks_is_named() -> None:
    for message in run_ranks(_with_a_changed_weight, 2, weights_config(), "parameter"):
        assert message.startswith(
            "inner step 2: the parameter of decoder.final_layernorm.weight differs between ranks "
            "(ranks [0] against [1]); 1 parameters of"
        )


def test_masters_that_were_not_published_are_named() -> None:
    for message in run_ranks(_with_a_changed_weight, 2, weights_config(), "masters"):
        assert message.startswith("inner step 2: rank 1: ")
        assert "is not its master weight in the precision of the model" in message


def test_equal_weights_pass_with_the_gather_overlapped() -> None:
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    assert run_ranks(_with_a_changed_weight, 2, weights_config(**overlap), "nowhere") == ["", ""]


# ---- the start -------------------------------------------------------------------------------


def _other_weights(config: RunConfig) -> str:
    def changed(*args: Any) -> Any:
        model = build_model(*args)
        if dist.get_rank() == 1:
            with torch.no_grad():
                model.output_layer.weight[0, 0] += 1.0
        return model

    message = ""
    with mock.patch("tests.support.tiny_models.build_model", changed):
        try:
            start_tiny(config)
        except SyncError as error:
            message = str(error)
    finish_tiny()
    return message


def test_replicas_must_start_from_the_same_weights() -> None:
    for message in run_ranks(_other_weights, 2, config_of(2)):
        assert message.startswith(
            "before the first round: the initial value of output_layer.weight differs between "
            "ranks (ranks [0] against [1])"
        )
        assert "same training.seed or load the same checkpoint" in message


def _other_shards() -> str:
    info = ParamInfo.from_name("a", (4, 2), partition_dim=None)
    end = 8 if dist.get_rank() < 2 else 6
    shards = [Shard(info, 0, end)]
    try:
        check_same_shards(dist.group.WORLD, shards)
    except RuntimeMismatch as error:
        return str(error)
    return ""


def test_ranks_at_one_position_must_hold_the_same_shards() -> None:
    for message in run_ranks(_other_shards, 3):
        assert message.startswith("ranks 0 and 2 are at the same position of their replicas, but")
        assert "rank 0 holds a [4x2] from 0 to 8 where rank 2 holds a [4x2] from 0 to 6" in message
    assert run_ranks(_other_shards, 2) == ["", ""]


# ---- the norm band ---------------------------------------------------------------------------


def _with_a_leap(config: RunConfig) -> dict[str, Any]:
    """Replica 3 leaps away, finitely, before the second outer step."""
    run = start_tiny(config).train(3)
    if run.groups.coords.replica == 3:
        for master in run.optimizer.view.masters.values():
            master += 10.0
        run.optimizer.view.publish()
    run.train(1)
    report = run.optimizer.last_outer
    assert report is not None
    assert run.optimizer.synchronizer is not None
    outcome = {
        "restarted_from_anchor": report.restarted_from_anchor,
        "weights": report.applied[0].weights.tolist(),
        "metrics": report.metrics(),
        "anchors": {n: a.clone() for n, a in run.optimizer.synchronizer.anchors().items()},
        "masters": {n: m for n, (_, m) in run.masters().items()},
    }
    run.train(2)
    assert run.optimizer.last_outer is not None
    outcome["later"] = run.optimizer.last_outer.applied[0].weights.tolist()
    finish_tiny()
    return outcome


def test_a_replica_outside_the_norm_band_is_left_out_of_one_mean() -> None:
    outer = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6, "sync_interval": 2}
    band = run_ranks(_with_a_leap, 4, config_of(4, outer=outer | {"guard": {"max_norm_ratio": 5}}))
    for rank in band:
        assert rank["weights"] == [1.0, 1.0, 1.0, 0.0]
        assert rank["later"] == [1.0] * 4
        assert not rank["restarted_from_anchor"]
        assert rank["metrics"]["muloco/excluded"] == 1
        for name, anchor in band[0]["anchors"].items():
            assert_equal(rank["anchors"][name], anchor)
            assert_equal(rank["masters"][name], anchor)
    without = run_ranks(_with_a_leap, 4, config_of(4, outer=outer))
    assert without[0]["weights"] == [1.0] * 4


# ---- sketches --------------------------------------------------------------------------------


def _compared(config: RunConfig, same: bool) -> dict[str, Any]:
    """Return what two rounds report."""
    run = start_tiny(config, same_for_all_replicas) if same else start_tiny(config)
    reports = []
    for _ in range(4):
        run.train(1)
        if run.optimizer.last_outer is not None:
            reports.append(run.optimizer.last_outer)
    finish_tiny()
    parts = [part for report in reports for part in report.applied]
    return {
        "cosines": [_cosines_of(part) for part in parts],
        "to_mean": [part.metrics()["muloco/cosine_to_mean"] for part in parts],
        "norms": [part.metrics()["muloco/pseudogradient_norm"] for part in parts],
        "metrics": [report.metrics() for report in reports],
    }


def _cosines_of(part: FragmentReport) -> torch.Tensor | None:
    """Return the cosines of all pairs of replicas; ``None`` where they were not compared."""
    compared = part.measurements.get("muloco/cosine_pairwise_min")
    replicas = len(part.weights)
    return None if compared is None else cosines(compared.numbers.view(replicas, replicas))


@pytest.mark.parametrize("parallel", [{}, {"tensor_model_parallel_size": 2}], ids=["tp1", "tp2"])
def test_sketches_tell_the_cosine_of_two_replicas(parallel: dict[str, int]) -> None:
    config = config_of(2, parallel=parallel)
    size = config.parallel.tensor_model_parallel_size
    width = sketch_width(config, Topology(2, size, 1, 1))
    ranks = run_ranks(_compared, 2 * size, config, False)
    for index in range(2):
        first, second = ranks[0], ranks[size]
        # With m = (x + y) / 2:  x.m = |x| |m| a  and  y.m = |y| |m| b, so that
        # |m|^2 = (x.m + y.m) / 2 gives |m|, and x.m = (|x|^2 + x.y) / 2 gives x.y.
        x, y = first["norms"][index], second["norms"][index]
        a, b = first["to_mean"][index], second["to_mean"][index]
        exact = (x * a * (x * a + y * b) - x * x) / (x * y)
        # A correlation of 4,096 numbers of a replica: five standard errors.
        limit = 5 * (1 - exact**2) / math.sqrt(size * width)
        for rank in ranks:
            measured = rank["cosines"][index]
            assert_equal(measured, first["cosines"][index])
            assert abs(float(measured[0, 1]) - exact) <= limit
            assert rank["metrics"][index]["muloco/cosine_pairwise_min"] == float(measured[0, 1])


def test_equal_replicas_have_cosine_one_and_intervals_are_kept() -> None:
    for rank in run_ranks(_compared, 2, config_of(2, monitor={"pseudogradient_interval": 2}), True):
        first, second = rank["cosines"]
        assert first is None
        assert "muloco/cosine_pairwise_min" not in rank["metrics"][0]
        torch.testing.assert_close(second, torch.ones(2, 2, dtype=torch.float64))


def test_without_an_interval_or_with_one_replica_nothing_is_compared() -> None:
    off = run_ranks(_compared, 2, config_of(2, monitor={"pseudogradient_interval": 0}), False)
    alone = run_ranks(_compared, 1, config_of(1), False)
    for rank in (*off, *alone):
        assert rank["cosines"] == [None, None]
