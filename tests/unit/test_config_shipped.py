"""Shipped configs pass the checks, give the papers' numbers, and say where values come from."""

from itertools import product
from pathlib import Path

import pytest

from megatron_muloco.config import check, derive, load_config, topology_of
from megatron_muloco.planning import render_plan

CONFIGS = Path(__file__).parents[2] / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "paper.yaml")
MODELS = sorted((CONFIGS / "models").glob("*.yaml"))
METHODS = sorted((CONFIGS / "methods").glob("*.yaml"))
# A study file is a grid of runs; its values are what is tried, not what is recommended.
ALL = sorted(p for p in CONFIGS.rglob("*.yaml") if "\nslices:" not in p.read_text("utf-8"))

CPU_RUNS = {"cpu_muloco": "cpu_dp_muon", "cpu_diloco": "cpu_dp_adamw"}
CPU_RUNS |= {baseline: baseline for baseline in CPU_RUNS.values()}
# weight decay of the MuLoCo code at 512 sequences per replica: Muon family, AdamW family
DECAY = {
    "150m": (0.01, 0.001),
    "416m": (0.01, 0.01),
    "914m": (0.01, 0.01),
    "1.76b": (0.001, 0.001),
    "3.1b": (0.001, 0.001),
    "15b": (1e-4, 1e-4),
}


def name_of(path: Path) -> str:
    return path.stem


def test_the_whole_tree_is_there() -> None:
    assert {path.stem for path in MODELS} == {"cpu", *DECAY}
    assert {path.stem for path in METHODS} == {
        *(f"{method}_k{k}" for method in ("muloco", "diloco") for k in (1, 2, 4, 8, 16)),
        "dp_muon",
        "dp_adamw",
    }
    assert {path.stem for path in RUNS} == {
        "15b_k16",
        "15b_k1",
        "15b_diloco_k16",
        "15b_diloco_k1",
        "15b_dp_adamw",
        "15b_dp_muon",
        "416m_muloco_k8",
        "416m_diloco_k8",
        "3.1b_muloco_k16",
        "3.1b_diloco_k16",
        "cpu_k2",
        *CPU_RUNS,
    }


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_runs_pass_and_have_a_plan(path: Path) -> None:
    config = load_config(path)
    assert "parameters" in render_plan(config)
    assert config.checkpoint.dir
    assert config.monitor.dir


@pytest.mark.parametrize("path", RUNS, ids=name_of)
def test_runs_end_with_a_round(path: Path) -> None:
    config = load_config(path)
    assert derive(config).flushed_steps == 0


@pytest.mark.parametrize(("model", "method"), list(product(MODELS, METHODS)), ids=name_of)
def test_any_model_goes_with_any_method(tmp_path: Path, model: Path, method: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: [{model}, {method}]\ncheckpoint: {{dir: runs/x}}\n")
    config = load_config(run)
    assert f"k{config.parallel.num_replicas}" in method.stem or config.outer.kind == "none"


@pytest.mark.parametrize(
    ("model", "method"),
    [(model, method) for model, method in product(MODELS, METHODS) if model.stem in DECAY],
    ids=name_of,
)
def test_weight_decay_is_that_of_the_optimizers_family(
    tmp_path: Path, model: Path, method: Path
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: [{model}, {method}]\ncheckpoint: {{dir: runs/x}}\n")
    config = load_config(run)
    base = DECAY[model.stem][("muon", "adamw").index(config.inner.kind)]
    assert derive(config).weight_decay == pytest.approx(base / config.parallel.num_replicas)


def test_a_number_replaces_the_weight_decay_per_optimizer(tmp_path: Path) -> None:
    run = tmp_path / "run.yaml"
    models, methods = CONFIGS / "models", CONFIGS / "methods"
    run.write_text(
        f"extends: [{models}/150m.yaml, {methods}/diloco_k1.yaml]\ncheckpoint: {{dir: runs/x}}\n"
    )
    config = load_config(run, ["inner.weight_decay_base=0.5"])
    assert derive(config).weight_decay == 0.5


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_method_replaces_any_other_method(tmp_path: Path, method: Path) -> None:
    model, run = CONFIGS / "models/cpu.yaml", tmp_path / "run.yaml"
    digests = {}
    for before in [None, *METHODS]:
        files = [model, *([] if before is None else [before]), method]
        run.write_text(f"extends: [{', '.join(map(str, files))}]\n")
        digests[before] = load_config(run).digest()
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("method", METHODS, ids=name_of)
def test_a_method_keeps_the_sync_interval_of_a_run(tmp_path: Path, method: Path) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"extends: [{CONFIGS}/cpu_muloco.yaml, {method}]\n")
    small_enough = ["training.micro_batch_size=2"]  # for 16 replicas
    outer = load_config(run, small_enough).outer
    assert outer.kind == "none" or outer.sync_interval == 5


@pytest.mark.parametrize(("name", "baseline"), CPU_RUNS.items())
def test_the_cpu_runs_differ_in_the_method_alone(name: str, baseline: str) -> None:
    run, other = (load_config(CONFIGS / f"{name}.yaml") for name in (name, baseline))
    for section in ("model", "data", "training", "inner"):
        assert getattr(run, section) == getattr(other, section)
    muon = load_config(CONFIGS / "cpu_muloco.yaml")
    assert (run.model, run.data, run.training) == (muon.model, muon.data, muon.training)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_every_value_has_a_source(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("#")
    for number, line in enumerate(lines, start=1):
        key, _, value = line.partition(":")
        written = value.split("#")[0].strip()
        names = key.strip() in ("extends", "kind", "dir", "train", "valid", "tokenizer_model")
        if line.startswith("#") or not written or names or key.strip() == "tokenizer_type":
            continue
        assert "#" in line, f"{path.name}:{number} has no comment: {line}"


# method, K: global batch, steps, weight decay, tokens; facts of the paper's six 15B runs
RUNS_15B = {
    "15b_dp_adamw": (1, 1_024, 145_320, 2e-4),
    "15b_dp_muon": (1, 2_048, 72_660, 4e-4),
    "15b_diloco_k1": (1, 512, 290_640, 1e-4),
    "15b_diloco_k16": (16, 2_048, 72_660, 2.5e-5),
    "15b_k16": (16, 4_096, 36_330, 5e-5),
}


@pytest.mark.parametrize("name", RUNS_15B)
def test_15b_runs_have_the_papers_numbers(name: str) -> None:
    config = load_config(CONFIGS / f"{name}.yaml")
    derived = derive(config)
    replicas, batch, steps, weight_decay = RUNS_15B[name]
    assert config.parallel.num_replicas == replicas
    assert config.training.global_batch_size == batch
    assert derived.train_iters == steps
    assert derived.weight_decay == pytest.approx(weight_decay, rel=1e-12)
    assert derived.train_tokens == 290_640 * 512 * 2_048
    assert round(derived.train_tokens / 1e9, 1) == 304.8


def test_muloco_15b_k1_ends_one_half_round_later_than_the_paper() -> None:
    derived = derive(load_config(CONFIGS / "15b_k1.yaml"))
    assert (derived.train_iters, derived.rounds) == (18_180, 606)
    assert derived.train_iters - 18_165 == 15
    assert derived.weight_decay == pytest.approx(1.6e-3, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "weight_decay", "steps"),
    [
        ("416m_muloco_k8", 0.00125, 8_160),
        ("416m_diloco_k8", 0.00125, 8_160),
        ("3.1b_muloco_k16", 2.5e-4, 14_640),
        ("3.1b_diloco_k16", 1.25e-4, 29_280),
    ],
)
def test_tuned_runs_follow_the_weight_decay_rule(
    name: str, weight_decay: float, steps: int
) -> None:
    derived = derive(load_config(CONFIGS / f"{name}.yaml"))
    assert derived.weight_decay == pytest.approx(weight_decay, rel=1e-12)
    assert derived.train_iters == steps


def test_the_15b_run_fits_the_world_its_comment_names() -> None:
    config = load_config(CONFIGS / "15b_k16.yaml")
    topology = topology_of(config, 1024)
    check(config, topology)
    assert str(topology) == "16 replicas x tp 4 x pp 2 x dp 8 = 1024 ranks"
    assert derive(config, topology).num_microbatches == 32


def test_the_cpu_run_is_small_and_warms_up_quickly() -> None:
    config = load_config(CONFIGS / "cpu_k2.yaml")
    derived = derive(config)
    assert 2.5e6 < derived.parameters.total < 4e6
    assert 0.5e6 < derived.train_tokens < 2e6
    assert 2_048 <= config.model.vocab_size <= 4_096
    assert config.inner.lr_warmup_iters <= 0.1 * derived.train_iters
    assert config.parallel.num_replicas == 2
