"""Branches of one checkpoint with larger batches: plan them, run them, and read their losses.

Every branch starts from the whole state of a checkpoint and trains on the same tokens, the ones
that come next, with k times the batch and 1/k of the steps. Its learning rate is constant: that of
the step after the checkpoint, times a function of k. Branches with equal tokens are compared by the
held-out loss after them.

Source: Merrill et al., "Critical Batch Size Revisited", arXiv 2505.23971: branched training. Ours
differs: the loss is held-out, of the anchor, where they smooth the training loss.
"""

import csv
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_muloco.config import RunConfig
from megatron_muloco.config.derived import smallest_topology, train_iterations
from megatron_muloco.config.inner import learning_rate
from megatron_muloco.config.load import load_config
from megatron_muloco.errors import ConfigError
from megatron_muloco.scaling.critical import Largest, largest_below
from tools.run_points import read_points
from tools.scaling.report import text_table

__all__ = ["TABLE", "Branch", "plan", "plan_text", "run", "verdict", "verdict_text"]

TABLE = "branches.csv"

_ROOT = Path(__file__).resolve().parents[2]
_LR_RULES = {"sqrt": math.sqrt, "linear": float, "none": lambda factor: 1.0}
_TAG = "lm loss validation"


@dataclass(frozen=True)
class Branch:
    """One branch.

    Attributes:
        factor: k, its batch over that of the checkpoint's run.
        batch: Batch in tokens.
        lr: Inner learning rate.
        steps: Inner steps after the checkpoint.
        tokens: Tokens after the checkpoint.
        config: File of its configuration.
        command: The command that trains it.
        loss: Held-out loss after it, nats per token; ``nan`` before it was trained.
    """

    factor: int
    batch: int
    lr: float
    steps: int
    tokens: int
    config: Path
    command: tuple[str, ...]
    loss: float = math.nan


def plan(
    checkpoint: Path, output: Path, *, factors: Sequence[int], tokens: float, lr_rule: str
) -> list[Branch]:
    """Write the configuration of every branch and return the branches.

    Args:
        checkpoint: Directory of a checkpoint, with the state of K replicas.
        output: Directory for configurations, checkpoints and events.
        factors: Batches over that of the run; 1 is among them.
        tokens: Tokens of a branch, rounded down to whole steps of the largest batch.
        lr_rule: ``sqrt``, ``linear`` or ``none``: factor on the learning rate.

    Raises:
        ConfigError: The checkpoint cannot be read, the run has no held-out data, or the tokens are
            fewer than one step.
    """
    from megatron_muloco.checkpoint.state import read_description

    description = read_description(checkpoint)
    config = RunConfig.model_validate(description.config)
    step, training = description.step, config.training
    factors = sorted(set(factors))
    if factors[0] != 1:
        raise ConfigError("--factors: 1, the batch of the run, must be among them to compare with.")
    if not config.data.valid:
        raise ConfigError(
            f"{checkpoint}: its run has no data.valid, so branches cannot be compared. Train it "
            f"with held-out data."
        )
    if step >= (last := train_iterations(config) or 0):
        raise ConfigError(
            f"{checkpoint} is after the last of {last} steps, where the learning rate has decayed. "
            f"Branch from an earlier one."
        )
    sequences = training.global_batch_size
    unit = math.lcm(*factors) * sequences * config.model.seq_length
    window = int(tokens // unit) * unit
    if not window:
        raise ConfigError(
            f"--tokens {tokens:g} is less than one step that all factors divide, {unit:,} tokens."
        )
    lr = learning_rate(config.inner, last, step + 1)
    branches = []
    for factor in factors:
        batch = factor * sequences
        steps = window // (batch * config.model.seq_length)
        rate = lr * _LR_RULES[lr_rule](factor)
        file = output / f"k{factor}.yaml"
        values = _values(config, factor, factors, rate, step + steps, checkpoint, output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(values, sort_keys=False, width=100), encoding="utf-8")
        ranks = smallest_topology(load_config(file)).world_size
        tokens_of_step = batch * config.model.seq_length
        branches.append(
            Branch(factor, tokens_of_step, rate, steps, window, file, _command(file, ranks))
        )
    return branches


def _values(
    config: RunConfig,
    factor: int,
    factors: Sequence[int],
    lr: float,
    last: int,
    checkpoint: Path,
    output: Path,
) -> dict[str, Any]:
    """Return the configuration of a branch as plain values."""
    values = config.model_dump(mode="json")
    training = values["training"]
    # Evaluation counts in batches; every branch must see the same held-out samples.
    samples = math.lcm(*factors) * -(-training["eval_iters"] // math.lcm(*factors))
    training |= {
        "global_batch_size": factor * training["global_batch_size"],
        "train_iters": last,
        "train_tokens": None,
        "tokens_per_parameter": None,
        "eval_iters": samples // factor,
        "eval_interval": last,
    }
    values["inner"] |= {"lr": lr, "lr_warmup_iters": 0, "lr_decay_style": "constant"}
    values["checkpoint"] = {
        "dir": str(output / f"k{factor}/checkpoints"),
        "resume": str(checkpoint),
        "keep": 1,
    }
    values["monitor"] |= {"dir": str(output / f"k{factor}/events"), "profile": {}}
    return values


def _command(config: Path, ranks: int) -> tuple[str, ...]:
    start = ("launch/pretrain.py", "--config", str(config))
    if ranks == 1:
        return ("python", *start)
    return ("python", "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", *start)


def plan_text(branches: Sequence[Branch]) -> str:
    """Return the branches as a table, and their commands."""
    rows = [
        (f"k = {b.factor}", f"{b.batch:,}", f"{b.lr:.4g}", str(b.steps), f"{b.tokens:,}")
        for b in branches
    ]
    table = text_table(("branch", "batch, tokens", "lr", "steps", "tokens"), rows)
    notes = [note for note in map(_round_note, branches) if note]
    return "\n".join([table, *notes, *(" ".join(b.command) for b in branches)])


def _round_note(branch: Branch) -> str:
    """Return a line where a branch ends between two outer steps; empty otherwise."""
    config = load_config(branch.config)
    interval = getattr(config.outer, "sync_interval", None)
    rest = (config.training.train_iters or 0) % interval if isinstance(interval, int) else 0
    if not rest:
        return ""
    return (
        f"! k = {branch.factor} ends {rest} steps after an outer step, and a round is {interval}: "
        f"its last round is short. Other --tokens avoid that."
    )


def run(branches: Sequence[Branch], output: Path) -> list[Branch]:
    """Train the branches that have no result yet, one after the other, and write the table.

    Raises:
        ConfigError: A branch failed; its log is named.
    """
    found = []
    for branch in branches:
        loss = _loss_of(branch)
        if loss is None:
            log = branch.config.with_suffix(".log")
            environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
            with log.open("w", encoding="utf-8") as file:
                ended = subprocess.run(
                    (sys.executable, *branch.command[1:-1], str(branch.config.resolve())),
                    stdout=file, stderr=subprocess.STDOUT, env=environment, check=False,
                )  # fmt: skip
            loss = _loss_of(branch)
            if ended.returncode or loss is None:
                raise ConfigError(f"branch k = {branch.factor} failed; its output is in {log}.")
        found.append(Branch(**{**vars(branch), "loss": loss}))
    with (output / TABLE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["factor", "batch_tokens", "inner.lr", "steps", "tokens", "loss"])
        writer.writerows([b.factor, b.batch, b.lr, b.steps, b.tokens, b.loss] for b in found)
    return found


def _loss_of(branch: Branch) -> float | None:
    """Return the held-out loss after the last step of a branch; None where it has not ended."""
    config = load_config(branch.config)
    directory = config.monitor.dir or ""
    if not Path(directory).is_dir():
        return None
    points = dict(read_points(directory).get(_TAG, []))
    return points.get(config.training.train_iters)


def verdict(branches: Sequence[Branch], tolerance: float) -> Largest:
    """Return the largest batch whose loss is at most that of k = 1 plus a tolerance.

    Raises:
        ConfigError: There are fewer than three branches.
    """
    batches, losses = [b.batch for b in branches], [b.loss for b in branches]
    return largest_below(batches, losses, losses[0] + tolerance)


def verdict_text(branches: Sequence[Branch], found: Largest, tolerance: float) -> str:
    """Return the losses as a table, and the critical batch."""
    base = branches[0].loss
    rows = [
        (f"k = {b.factor}", f"{b.batch:,}", f"{b.lr:.4g}", f"{b.loss:.4f}", f"{b.loss - base:+.4f}")
        for b in branches
    ]
    table = text_table(("branch", "batch, tokens", "lr", "held-out loss", "above k = 1"), rows)
    value = f"> {found.grid:.4g}" if found.beyond else f"{found.value:.4g}"
    line = f"critical batch, at most {tolerance:g} nats per token above k = 1: {value} tokens"
    notes = [f"! {note}" for note in found.notes]
    return "\n".join([table, f"{line} (largest tried: {found.grid:.4g})", *notes])
