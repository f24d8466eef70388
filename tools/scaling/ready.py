"""`ready_config`: a config that is complete, labelled and checked, from evidence about a target."""

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_muloco.config import (
    Derived,
    RunConfig,
    derive,
    find_problems,
    load_config,
    smallest_topology,
    topology_of,
)
from megatron_muloco.config.load import load_document
from megatron_muloco.errors import ConfigError
from megatron_muloco.planning import render_plan
from megatron_muloco.planning.report import human_count
from tools.scaling.evidence import Evidence
from tools.scaling.labelled import Target, Value, config_text

__all__ = [
    "CONFIGS", "Ready", "check_text", "divisible_batch", "load_text", "method_file",
    "model_budget", "ready_config", "tokens_of",
]  # fmt: skip

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

_NAMES = {
    "muloco": "MuLoCo", "diloco": "DiLoCo", "dp_muon": "Muon, data parallel",
    "dp_adamw": "AdamW, data parallel",
}  # fmt: skip
_SECTIONS = ("model", "parallel", "training", "inner", "outer", "checkpoint", "monitor")
_WORLD = 1024
_MICROBATCHES = 8  # fewer leave a pipeline idle
_REFERENCE_BATCH = 512  # sequences per replica at which configs/paper.yaml states weight decay
_EVALUATED = 1024  # sequences per evaluation, as in the code of the MuLoCo paper
_WARMUP, _WARMUP_SHARE = 500, 0.2
_LEGEND = (
    "Labels: paper, printed or in the authors' code; measured, best run of a study; fitted, a law "
    "with its interval; rule, follows from other values; target, as asked for; chosen, ours."
)


@dataclass(frozen=True)
class Ready:
    """A config before it is written to a place.

    Attributes:
        extends: Files that it extends, absolute.
        values: Keys with values and labels.
        command: What writes it; empty for none.
        method: Method in words and K.
        world: Ranks that the title describes; 0 to choose.
        notes: Further lines of the title.
    """

    extends: Sequence[Path]
    values: Sequence[Value]
    method: str
    command: str = ""
    world: int = 0
    notes: Sequence[str] = field(default=())

    def text(self, directory: Path, title: Sequence[str] = ()) -> str:
        """Return the file for a directory; ``extends`` is relative to it."""
        lines = [*title, *self.notes, _LEGEND]
        lines += [f"Written by: {self.command}"] if self.command else []
        places = [Path(os.path.relpath(path, directory.resolve())) for path in self.extends]
        return config_text(lines, places, self.values)


def ready_config(
    target: Target,
    evidence: Evidence,
    model: Path,
    run: str,
    *,
    command: str = "",
    others: Sequence[Value] = (),
    ranks: int = 0,
    micro: int = 0,
) -> Ready:
    """Return a config for a target, every value from evidence or by rule.

    Args:
        target: The run.
        evidence: Where the settings come from.
        model: File of the model, or of what all models share.
        run: Directory of checkpoints and logs.
        command: What writes the file, for its title.
        others: Further values.
        ranks: Data-parallel ranks of all replicas that the batch is for; one for each by default.
        micro: Sequences per microbatch; by default that of the model's file.
    """
    method, replicas = method_file(target)
    micro = micro or _micro_batch(model)
    parts = ranks or target.replicas
    batch, smaller = divisible_batch(evidence.batch(target), parts, micro)
    replaced = {value.key for value in smaller}
    outer = evidence.outer(target)
    interval = next((v.value for v in outer if v.key == "outer.sync_interval"), 1)
    steps = math.ceil(target.tokens / (batch.value * target.seq_length))
    sequences = "rule: the code's 1,024 sequences per evaluation, or one batch"
    values = [
        *replicas,
        *smaller,
        *(value for value in others if value.key.startswith(("model", "parallel"))),
        batch,
        *_length(target, steps, interval, model),
        Value("training.eval_iters", max(1, _EVALUATED // batch.value), sequences),
        evidence.inner_lr(target),
        _warmup(steps),
        _weight_decay(evidence.weight_decay(target), batch, target),
        *outer,
        *(
            v
            for v in others
            if not v.key.startswith(("model", "parallel")) and v.key not in replaced
        ),
        Value("checkpoint.dir", run),
        Value("monitor.dir", f"{run}/tensorboard"),
    ]
    values.sort(key=lambda value: _SECTIONS.index(value.key.partition(".")[0]))  # stable
    words = _NAMES[target.method]
    if target.has_outer_step:
        words += f", {target.replicas} replica{'s' * (target.replicas > 1)}"
    return Ready([model, method], values, words, command)


def check_text(ready: Ready, directory: Path) -> str:
    """Return the file for a directory, after the checks and the plan of ``--dry-run``.

    Raises:
        ConfigError: The config does not pass.
    """
    config = load_text(ready)
    render_plan(config)
    return ready.text(directory, _title(ready, config))


def load_text(ready: Ready, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the checked config, read from a temporary file."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run.yaml"
        path.write_text(ready.text(path.parent), encoding="utf-8")
        return load_config(path, overrides)


def method_file(target: Target) -> tuple[Path, list[Value]]:
    """Return the method's file of the nearest K, and the value of K where there is none of it."""
    if not target.has_outer_step:
        return CONFIGS / f"methods/{target.method}.yaml", []
    near = min((1, 2, 4, 8, 16), key=lambda k: abs(math.log2(k / target.replicas)))
    path = CONFIGS / f"methods/{target.method}_k{near}.yaml"
    if near == target.replicas:
        return path, []
    return path, [Value("parallel.num_replicas", target.replicas, "target: K")]


def model_budget(model: Path) -> Derived:
    """Return what follows from a model's file: parameters, and the tokens that it states."""
    text = config_text((), [], [Value("checkpoint.dir", "runs/x")])
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "run.yaml"
        parents = [model.resolve(), CONFIGS / "methods/dp_muon.yaml"]
        path.write_text(f"extends: [{', '.join(map(str, parents))}]\n{text}", encoding="utf-8")
        return derive(load_config(path))


def tokens_of(text: str, params: int) -> float:
    """Return a token budget: ``20x`` the parameters, ``30e9`` or ``30B``.

    Raises:
        ConfigError: It is none of these, or not positive.
    """
    factors: dict[str, float] = {"x": params, "M": 1e6, "B": 1e9, "T": 1e12}
    unit = text[-1:] if text[-1:] in factors else ""
    try:
        tokens = float(text.removesuffix(unit)) * factors.get(unit, 1)
    except ValueError:
        tokens = math.nan
    if not (tokens > 0 and math.isfinite(tokens)):
        raise ConfigError(
            f"--tokens {text} is no token budget; write 20x for 20 tokens per parameter, or a "
            f"number such as 30e9 or 30B."
        )
    return tokens


# ---- values by rule -----------------------------------------------------------------------------


def divisible_batch(batch: Value, parts: int, micro: int) -> tuple[Value, list[Value]]:
    """Return the batch as a multiple of ``parts`` ranks, and the microbatch where it must fall.

    Args:
        batch: Sequences of all replicas.
        parts: Data-parallel ranks of all replicas.
        micro: Sequences per microbatch of the model's file.
    """
    share = batch.value / parts
    fits = 2 ** max(0, min(math.floor(math.log2(max(share, 1))), round(math.log2(micro))))
    smaller = []
    if fits < micro:
        label = f"rule: {micro} in the model's file is more than a rank's share of the batch"
        smaller = [Value("training.micro_batch_size", fits, label)]
    total = max(1, round(share / fits)) * fits * parts
    if total == batch.value:
        return batch, smaller
    label = f"{batch.label}; rounded to a multiple of {parts} x {fits}"
    return Value(batch.key, total, label), smaller


def _micro_batch(model: Path) -> int:
    return int(load_document(model).values.get("training", {}).get("micro_batch_size", 1))


def _length(target: Target, steps: int, interval: int, model: Path) -> list[Value]:
    """Return the length of the run, in steps where the tokens end inside a round."""
    given = load_document(model).values.get("training", {})
    per_parameter = target.tokens / target.params
    if steps % interval == 0:
        label = f"target: {per_parameter:.3g} tokens per parameter; {steps:,} steps"
        length = Value("training.train_tokens", int(target.tokens), label)
    else:
        rounds = math.ceil(steps / interval)
        label = f"rule: {rounds:,} rounds of {interval}; {steps:,} steps end inside a round"
        length = Value("training.train_iters", rounds * interval, label)
    lengths = ("train_iters", "train_tokens", "tokens_per_parameter")
    replaced = [f"training.{key}" for key in lengths if given.get(key) is not None]
    label = "rule: replaced by the length below"
    return [*(Value(key, None, label) for key in replaced if key != length.key), length]


def _weight_decay(base: Value, batch: Value, target: Target) -> Value:
    replica = batch.value / target.replicas
    used = base.value * replica / _REFERENCE_BATCH
    label = f"{base.label}: {used:.3g} at {replica:g} sequences"
    return Value(base.key, base.value, label)


def _warmup(steps: int) -> Value:
    key, most = "inner.lr_warmup_iters", int(_WARMUP_SHARE * steps)
    if most >= _WARMUP:
        return Value(key, _WARMUP, "paper: code, linear")
    label = f"chosen: a fifth of the steps; the paper's {_WARMUP} are longer"
    return Value(key, max(1, most), label)


# ---- title --------------------------------------------------------------------------------------


def _title(ready: Ready, config: RunConfig) -> list[str]:
    derived = derive(config)
    rounds = f" = {derived.rounds:,} rounds" if derived.rounds else ""
    first = (
        f"{ready.method}, {human_count(derived.parameters.total)} parameters, "
        f"{derived.train_iters:,} steps{rounds}, {human_count(derived.train_tokens)} tokens."
    )
    world = ready.world or _example_world(config)
    topology = topology_of(config, world)
    where = " in each replica" if topology.num_replicas > 1 else ""
    number = derive(config, topology).num_microbatches
    turns = f"{number} microbatch{'es' * (number > 1)} per step"
    ranks = f"At {world:,} GPUs: dp {topology.data}{where}, {turns}."
    return [first, ranks]


def _example_world(config: RunConfig) -> int:
    """Return a world for the title: at most 1,024 ranks, with enough microbatches per step."""
    smallest = smallest_topology(config).world_size
    world = smallest
    while 2 * world <= _WORLD and _microbatches(config, 2 * world) >= _MICROBATCHES:
        world *= 2
    return world


def _microbatches(config: RunConfig, world: int) -> int:
    topology = topology_of(config, world)
    if find_problems(config, topology):
        return 0
    return derive(config, topology).num_microbatches
