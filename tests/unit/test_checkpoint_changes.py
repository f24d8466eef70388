"""Where the state of K replicas goes in a run of K' replicas, or of another method."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_muloco.checkpoint.changes import RunningMean, Takeover, change_notes
from megatron_muloco.checkpoint.state import ANCHOR, FORMAT, Description
from megatron_muloco.config.inner import MuonConfig
from megatron_muloco.data.sampler import BatchLayout, RunLayout
from megatron_muloco.errors import CheckpointError
from megatron_muloco.optim.muon import Muon
from tests.support.tensors import assert_equal

NESTEROV = {"kind": "nesterov", "lr": 0.7, "momentum": 0.6}
BETA = 0.875  # 1 - BETA and its inverse are powers of two: factors below are exact
ADAMW = {"kind": "adamw", "adam": {"beta1": BETA}}
MUON = {
    "kind": "muon",
    "adam": {"beta1": BETA},
    "muon": {"momentum": BETA, "accumulation": "heavy_ball"},
}


def config(replicas: int, outer: Any = NESTEROV, inner: Any = MUON) -> dict[str, Any]:
    return {"parallel": {"num_replicas": replicas}, "outer": outer, "inner": inner}


def saved(
    replicas: int, outer: Any = NESTEROV, inner: Any = MUON, *, has_masters: bool = True
) -> Description:
    entries = [
        {
            "digests": {ANCHOR: "a", f"replica_{r}.inner.exp_avg": f"m{r}"},
            "inner_step": 10 + r,
            "synchronizer": {
                "step": 7,
                "guard": {"medians_per_lr": {"0": 2.0}},
                "in_flight": [{"fragment": 0, "norm": float(r)}],
                "progress": [{"steps": 2, "trained": float(r)}, {"steps": 1, "trained": 1.0}],
            },
        }
        for r in range(replicas)
    ]
    return Description(
        format=FORMAT,
        step=7,
        topology={},
        anchor_digest="a",
        versions={},
        has_masters=has_masters,
        scalars={},
        replicas=entries,
        config=config(replicas, outer, inner),
    )


def takeover(before: Description, current: dict[str, Any], own: int = 0) -> Takeover:
    return Takeover(before, current, own)


# ---- K ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [0, 1])
def test_with_the_same_k_every_replica_takes_its_own(own: int) -> None:
    same = takeover(saved(2), config(2), own)
    assert not same.changes_training
    assert same.masters() == (f"replica_{own}.master",)
    assert same.moment("exp_avg") == f"replica_{own}.inner.exp_avg"
    assert same.outer("residual") == (f"replica_{own}.outer.residual",)
    assert same.outer_scalars() == same.saved.replicas[own]["synchronizer"]


@pytest.mark.parametrize(
    ("before", "now", "sources"),
    [
        (1, 4, [0, 0, 0, 0]),
        (2, 5, [0, 1, 0, 1, 0]),
        (3, 4, [0, 1, 2, 0]),
        (4, 2, [0, 1]),
        (3, 1, [0]),
    ],
)
def test_moments_stay_and_new_replicas_copy_in_turn(
    before: int, now: int, sources: list[int]
) -> None:
    each = [takeover(saved(before), config(now), own) for own in range(now)]
    assert [t.moment("exp_avg") for t in each] == [
        f"replica_{source}.inner.exp_avg" for source in sources
    ]
    # What is the same for all replicas comes from where it was; the rest is the mean of all.
    for t in each:
        assert t.outer("momentum") == ("outer.momentum",)
        assert t.outer("mean") == ("outer.mean",)
        assert t.outer("owner_residual") == ("outer.owner_residual",)
        for kind in ("residual", "at_launch"):
            assert t.outer(kind) == tuple(f"replica_{k}.outer.{kind}" for k in range(before))
        assert t.masters() == tuple(f"replica_{k}.master" for k in range(before))


def test_at_a_boundary_the_anchor_is_all_that_is_needed() -> None:
    assert takeover(saved(2, has_masters=False), config(3)).masters() == (ANCHOR,)


def test_norms_of_another_k_are_forgotten_and_progress_is_shared() -> None:
    scalars = takeover(saved(3), config(2), own=1).outer_scalars()
    assert scalars["guard"] == {}
    assert scalars["progress"] == [{"steps": 2, "trained": 1.0}, {"steps": 1, "trained": 1.0}]
    assert scalars["in_flight"] == [{"fragment": 0, "norm": 1.0}]


@pytest.mark.parametrize(("before", "now"), [(1, 3), (2, 3), (4, 2), (3, 1)])
def test_the_mean_pseudogradient_and_its_residual_survive(before: int, now: int) -> None:
    """Mean over replicas of ``anchor - local + e``: what the next outer step would see."""
    generator = torch.Generator().manual_seed(before)
    anchor = torch.randn(64, generator=generator)
    local = [torch.randn(64, generator=generator) for _ in range(before)]
    residual = [torch.randn(64, generator=generator) for _ in range(before)]

    def mean(tensors: list[Tensor]) -> Tensor:
        running = RunningMean()
        for tensor in tensors:
            running.add({"w": tensor.clone()})
        return running.mean["w"]

    def seen(local: list[Tensor], residual: list[Tensor]) -> Tensor:
        sent = [anchor - x + e for x, e in zip(local, residual, strict=True)]
        return torch.stack(sent).double().mean(0)

    after = seen([mean(local)] * now, [mean(residual)] * now)
    # At most 8 roundings on each side, of numbers below 8: each is at most 2^-24 of them.
    torch.testing.assert_close(after, seen(local, residual), rtol=0, atol=16 * 8 * 2.0**-24)


@pytest.mark.parametrize("count", range(1, 8))
def test_the_mean_of_equal_tensors_is_that_tensor(count: int) -> None:
    tensor = torch.randn(100, generator=torch.Generator().manual_seed(0))
    running = RunningMean()
    for _ in range(count):
        running.add({"w": tensor.clone()})
    assert_equal(running.mean["w"], tensor)


def test_what_is_not_finite_is_not_spread() -> None:
    t = takeover(saved(2), config(3))
    t.require_finite(set())
    with pytest.raises(CheckpointError, match=r"not finite in replica_1\.master.*guard sets such"):
        t.require_finite({"replica_1.master"})


def test_digests_are_those_of_the_replica_that_saved() -> None:
    t = takeover(saved(2), config(4), own=3)
    assert t.digest(ANCHOR) == "a"
    assert t.digest("replica_1.inner.exp_avg") == "m1"
    assert t.digest("outer.mean") is None  # nothing was in flight


def test_every_sample_is_read_once_whatever_k_becomes() -> None:
    """Batch and K change together and alone, inside and at the end of rounds."""
    read: Counter[int] = Counter()
    step = consumed = 0
    for replicas, data, batch, steps in (
        (1, 1, 12, 2),
        (2, 3, 12, 3),
        (4, 1, 8, 1),
        (3, 2, 12, 4),
        (1, 4, 4, 2),
    ):
        layout = RunLayout(((1, BatchLayout(batch, replicas, data, 1)),)).resumed(step, consumed)
        for now in range(step + 1, step + steps + 1):
            at = layout.at(now)
            for replica in range(replicas):
                for rank in range(data):
                    for micro in range(at.num_microbatches):
                        read.update(at.indices(now, replica, rank, micro))
        step += steps
        consumed = layout.consumed(step)
    assert read == Counter(range(consumed))
    assert consumed == 2 * 12 + 3 * 12 + 8 + 4 * 12 + 2 * 4


# ---- method -------------------------------------------------------------------------------------


def test_outer_steps_begin_and_end() -> None:
    begins = takeover(saved(1, {"kind": "none"}, has_masters=False), config(4), own=3)
    assert begins.begins_outer
    assert begins.masters() == (ANCHOR,)
    assert begins.moment("exp_avg") == "replica_0.inner.exp_avg"
    ends = takeover(saved(2), config(1, {"kind": "none"}))
    assert not ends.begins_outer
    assert ends.masters() == ("replica_0.master", "replica_1.master")


def test_momentum_belongs_to_one_kind_of_outer_step() -> None:
    assert takeover(saved(2), config(2, {"kind": "average"})).outer("momentum") == ()
    assert takeover(saved(2), config(3)).outer("momentum") == ("outer.momentum",)


NAMES = {"momentum_buffer": ["matrix"], "exp_avg": ["norm"], "exp_avg_sq": ["norm"]}


@pytest.mark.parametrize("accumulation", ["heavy_ball", "ema"])
def test_muon_goes_on_with_the_first_moment_of_adamw(accumulation: str) -> None:
    """With equal decays the result is the momentum that Muon would have had all along."""
    muon = {"momentum": BETA, "accumulation": accumulation}
    t = takeover(saved(1, inner=ADAMW), config(1, inner={**MUON, "muon": muon}))
    every = ["matrix", "norm"]
    assert t.moments_read(NAMES) == {"exp_avg": every, "exp_avg_sq": every}

    rule = Muon(MuonConfig.model_validate(muon))
    expected, first = torch.zeros(8), torch.zeros(8)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        # Small integers: all products and sums with BETA = 7/8 are exact in five steps.
        gradient = torch.randint(-4, 5, (8,), generator=generator).float()
        rule.accumulate([gradient], {"momentum_buffer": [expected]})
        first.mul_(BETA).add_(gradient, alpha=1 - BETA)
    read = {
        "exp_avg": {"matrix": first, "norm": torch.ones(3)},
        "exp_avg_sq": {"matrix": first.square(), "norm": torch.full((3,), 2.0)},
    }
    own = {
        "momentum_buffer": {"matrix": torch.empty(8)},
        "exp_avg": {"norm": torch.empty(3)},
        "exp_avg_sq": {"norm": torch.empty(3)},
    }
    moments, step = t.moments(read, own)
    assert step == 10
    assert_equal(moments["momentum_buffer"]["matrix"], expected)
    assert_equal(moments["exp_avg"]["norm"], read["exp_avg"]["norm"])
    assert_equal(moments["exp_avg_sq"]["norm"], read["exp_avg_sq"]["norm"])


def test_adamw_begins_afresh_after_muon() -> None:
    t = takeover(saved(2), config(2, inner=ADAMW), own=1)
    assert t.moments_read({"exp_avg": ["matrix", "norm"]}) == {}
    own = {kind: {"matrix": torch.ones(8)} for kind in ("exp_avg", "exp_avg_sq")}
    moments, step = t.moments({}, {"momentum_buffer": {}, **own})
    assert step == 0
    assert not any(t.any() for held in moments.values() for t in held.values())


# ---- what is said -------------------------------------------------------------------------------


def test_rates_of_another_k_are_named_with_a_direction() -> None:
    def warnings(before: int, now: int, outer: Any = NESTEROV) -> list[str]:
        notes = change_notes(saved(before), config(now, outer), ())
        return [line for line in notes if line.startswith("WARNING")]

    (up,) = warnings(2, 4)
    assert "outer.lr 0.7 and outer.momentum 0.6 are those of 2 replicas" in up
    assert "4 replicas call for higher values" in up
    assert "lower" in warnings(4, 2)[0]
    assert "outer.lr" not in warnings(2, 4, {**NESTEROV, "lr": 0.9})[0]
    assert warnings(2, 4, {**NESTEROV, "lr": 0.9, "momentum": 0.8}) == []
    assert warnings(2, 2) == []


def test_notes_say_where_parameters_and_moments_come_from() -> None:
    inside = "\n".join(change_notes(saved(2), config(3), ()))
    assert "parallel.num_replicas: 2 when saved, 3 now" in inside
    assert "the mean of those of the 2 replicas" in inside
    boundary = "\n".join(change_notes(saved(2, has_masters=False), config(3), ()))
    assert "local parameters are the anchor" in boundary
    assert change_notes(saved(2), config(2), ()) == []
