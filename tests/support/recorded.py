"""Records a run of the real program and repeats it with the reference, bit for bit.

The reference does not train. Its inner steps replay the recorded changes of each replica's masters,
after checking that they start from the same bits. So every outer step, every merge and the flush
between them have to agree bit for bit. Each position of the replicas is one reference.
"""

from typing import Any

from megatron_muloco.comm.chunking import row_places
from megatron_muloco.config import RunConfig
from megatron_muloco.outer.fragments import FragmentPlan
from megatron_muloco.outer.reference import Parameters, Reference, Settings
from tests.support.compressed import reference_keys
from tests.support.tensors import assert_equal
from tests.support.tiny_models import finish_tiny, start_tiny

__all__ = ["assert_is_the_reference", "recorded", "reference_of"]

Moves = list[tuple[Parameters, Parameters]]


def recorded(config: RunConfig) -> dict[str, Any]:
    """Train to the end and flush; return the inner steps, the anchors and the final state."""
    run = start_tiny(config)
    owned = [s.name for s in run.optimizer.view.shards if s.param.is_primary]
    masters, moves, anchors = run.optimizer.view.masters, [], []
    synchronizer = run.optimizer.synchronizer
    assert synchronizer is not None

    def snapshot(tensors: Any) -> Parameters:
        return {name: tensors[name].clone() for name in owned}

    inner_step = run.optimizer.inner_step

    def record() -> Any:
        before = snapshot(masters)
        report = inner_step()
        moves.append((before, snapshot(masters)))
        return report

    run.optimizer.inner_step = record  # type: ignore[method-assign]
    for _ in range(config.training.train_iters or 0):
        run.train(1)
        anchors.append(snapshot(synchronizer.anchors()))
    run.optimizer.flush()
    anchors.append(snapshot(synchronizer.anchors()))
    end = snapshot(masters)
    kept = synchronizer.state_dict()["tensors"]
    residuals = {
        kind: snapshot(kept[kind]) for kind in ("residual", "owner_residual") if kind in kept
    }
    finish_tiny()
    return {
        "moves": moves,
        "anchors": anchors,
        "end": end,
        "rows": row_places(run.optimizer.view.shards),
        "params": [s.param for s in run.optimizer.view.shards if s.param.is_primary],
        "residuals": residuals,
    }


def _replay(moves: Moves) -> Any:
    """Return an inner step that replays a recording, after checking where it starts."""

    def step(local: Parameters, t: int) -> None:
        before, after = moves[t - 1]
        for name, tensor in local.items():
            assert_equal(tensor, before[name], f"{name} before inner step {t}")
            tensor.copy_(after[name])

    return step


def reference_of(config: RunConfig, members: list[dict[str, Any]]) -> Reference:
    """Return the reference of one position, over the ranks that hold it."""
    o = config.outer
    initial = members[0]["moves"][0][0]
    params = members[0]["params"]
    plan = FragmentPlan.from_config(o, params, num_layers=config.model.num_layers)
    sizes = [{name: initial[name].numel() for name in names} for names in plan.fragments]
    settings = Settings(
        sync_interval=o.sync_interval,
        train_iters=config.training.train_iters or 0,
        fragments=plan.fragments,
        overlap_steps=o.overlap_steps,
        mixing_weight=o.effective_mixing_weight,
        additive=o.apply == "additive",
        outer_lr=o.lr,
        outer_momentum=o.momentum,
        **reference_keys(
            o.compression,
            members[0]["rows"],
            {param.name: param.kind for param in params},
            sizes,
            len(members),
        ),
    )
    return Reference(initial, [_replay(member["moves"]) for member in members], settings)


def assert_is_the_reference(config: RunConfig, ranks: list[dict[str, Any]]) -> None:
    """Fail unless the recordings of all ranks are what the reference computes."""
    replicas = config.parallel.num_replicas
    size = len(ranks) // replicas
    for position in range(size):
        members = ranks[position::size]
        reference = reference_of(config, members)
        for t in range(1, (config.training.train_iters or 0) + 1):
            reference.step(t)
            for member in members:
                _assert_same(member["anchors"][t - 1], reference.anchor, f"anchor after step {t}")
        reference.flush()
        for k, member in enumerate(members):
            residuals = {"residual": reference.residual[k], "owner_residual": reference.f}
            for kind, tensors in member["residuals"].items():
                _assert_same(tensors, residuals[kind], f"{kind} of replica {k}")
            _assert_same(member["anchors"][-1], reference.anchor, "flushed anchor")
            _assert_same(member["end"], reference.local[k], "local parameters at the end")


def _assert_same(actual: Parameters, expected: Parameters, message: str) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_equal(actual[name], tensor, f"{message}, {name}")
