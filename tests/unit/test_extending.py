"""A codec and a metric from outside work from the config to TensorBoard, the package unchanged."""

import ast
import io
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_muloco.comm.compressed import build_compressed_reducer_for
from megatron_muloco.config import load_config, with_compression
from megatron_muloco.config.derived import topology_of
from megatron_muloco.errors import RuntimeMismatch
from megatron_muloco.monitor.build import build_monitor
from megatron_muloco.monitor.console import Console
from megatron_muloco.monitor.metrics import METRICS, MetricTable
from megatron_muloco.outer.reference import Settings
from megatron_muloco.outer.schedule import SyncSchedule
from megatron_muloco.params import ParamKind
from megatron_muloco.planning import render_plan
from tests.support.extensions import ZERO_SHARE, ZeroShare
from tests.support.own_codec import SignCompression
from tests.support.replicas import Replica, synchronizer_of

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
KINDS: dict[str, ParamKind | None] = {
    "decoder.layers.0.mlp.linear_fc1.weight": "fc1",
    "decoder.layers.0.mlp.linear_fc2.weight": "fc2",
}


def test_a_codec_and_a_metric_go_from_the_config_to_tensorboard(tmp_path: Path) -> None:
    # config
    path = ROOT / "configs" / "cpu_k2.yaml"
    changes = ["parallel.num_replicas=1", "outer.sync_interval=2", f"monitor.dir={tmp_path}"]
    config = with_compression(load_config(path, changes), SignCompression())
    # plan
    topology = topology_of(config, 1)
    assert "sign  1 bit; a scale per block of 256" in render_plan(config, topology)
    # reducer: one of two equal matrices moves, so half of the mean is 0
    fc1, fc2 = KINDS
    replica = Replica({fc1: torch.zeros(512), fc2: torch.ones(512)})
    compressed = build_compressed_reducer_for(None, CPU, config.outer.compression, {}, KINDS)
    settings = Settings(
        sync_interval=2, train_iters=2, fragments=[[fc1, fc2]], outer_lr=0.7, outer_momentum=0.0
    )
    synchronizer = synchronizer_of(replica.port(), settings, ZeroShare(compressed), 1)
    replica.parameters[fc1].add_(1.0)
    assert synchronizer.after_inner_step(1) is None
    report = synchronizer.after_inner_step(2)
    assert report is not None
    # TensorBoard
    table = MetricTable([*METRICS, ZERO_SHARE])
    schedule = SyncSchedule.from_config(config.outer, train_iters=2)
    options = {"device": CPU, "writes": True, "console": Console(io.StringIO())}
    monitor = build_monitor(config, topology, schedule, metrics=table, **options)
    monitor.outer_step(report)
    monitor.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars(ZERO_SHARE.tag)] == [(2, 0.5)]
    assert [(e.step, e.value) for e in found.Scalars("muloco/compression_error")] == [(2, 0.0)]
    # without its row the same report is refused
    with pytest.raises(RuntimeMismatch, match=r"lab/zero_share.*is not in the registry"):
        build_monitor(config, topology, schedule, **options).outer_step(report)


@pytest.mark.parametrize("name", ["own_codec", "extensions"])
def test_extensions_use_public_names_only(name: str) -> None:
    tree = ast.parse((ROOT / f"tests/support/{name}.py").read_text(encoding="utf-8"))
    imports = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("megatron_muloco")
    ]
    assert imports
    for node in imports:
        public = import_module(str(node.module)).__all__
        assert not [alias.name for alias in node.names if alias.name not in public]
