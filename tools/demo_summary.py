"""Summary of what a run learned, from its event files: python -m tools.demo_summary --config F."""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.errors import ConfigError, run_tool
from megatron_muloco.monitor.monitor import SAMPLE_TAG
from tools.compare import comparison_of
from tools.comparing.courses import warnings_of
from tools.corpora.statistics import unigram_cross_entropy
from tools.run_points import Points, read_points, text_of

# Trained once, as docs/experiments/LOG.md says: a demo that trains it too would take twice as long.
BASELINE = Path(__file__).resolve().parents[1] / "docs/experiments/demo_dp_muon"


@dataclass(frozen=True)
class Learned:
    """What the event files and the data say.

    Attributes:
        before: First held-out loss of the anchor, with its inner step.
        after: Last one.
        unigram: Held-out cross-entropy of the training text's unigram model.
        tokens_per_s: Median over the run; ``None`` when it was not written.
        bytes_sent: In outer steps, by the writing rank.
    """

    before: tuple[int, float]
    after: tuple[int, float]
    unigram: float
    tokens_per_s: float | None
    bytes_sent: int

    def __str__(self) -> str:
        speed = "n/a" if self.tokens_per_s is None else f"{self.tokens_per_s:,.0f}"
        gain = self.unigram - self.after[1]
        return "\n".join(
            (
                "Held-out text, nats per token",
                f"  anchor at iteration {self.before[0]:<6d}            {self.before[1]:8.4f}",
                f"  anchor at iteration {self.after[0]:<6d}            {self.after[1]:8.4f}",
                f"  unigram model of the training text  {self.unigram:8.4f}",
                f"  anchor below the unigram model by   {gain:8.4f}",
                f"Tokens per second, all replicas       {speed:>8s}",
                f"Bytes sent per rank, outer steps      {self.bytes_sent:,}",
            )
        )


def learned(config: RunConfig, points: Points) -> Learned:
    """Return what a run learned.

    Raises:
        ConfigError: The run has no evaluation, or its data cannot be read.
    """
    held_out = sorted(points.get("lm loss validation", []))
    if not held_out:
        raise ConfigError(
            f"monitor.dir: the event files in {config.monitor.dir} hold no `lm loss validation`. "
            "Set training.eval_interval and data.valid, and train again."
        )
    speeds = [value for _, value in points.get("perf/tokens_per_s", [])]
    return Learned(
        before=held_out[0],
        after=held_out[-1],
        unigram=unigram_cross_entropy(
            [source.path for source in config.data.train],
            [source.path for source in config.data.valid],
            config.model.vocab_size,
        ),
        tokens_per_s=statistics.median(speeds) if speeds else None,
        bytes_sent=round(sum(value for _, value in points.get("muloco/wire_bytes", []))),
    )


def comparison(directory: str, baseline: Path) -> str:
    """Return how a run compares with a baseline: the table, or why there is none."""
    try:
        runs = comparison_of([Path(directory), baseline])
    except ConfigError as error:
        return f"No comparison with {baseline}: {error.problems[0]}"
    notes = [f"note: {text}" for text in warnings_of(runs.courses)]
    return "\n".join([str(runs), *notes])


def summarise(config_path: str, baseline: Path) -> None:
    """Print the summary of the run that a config describes, beside a baseline."""
    config = load_config(config_path)
    if config.monitor.dir is None:
        raise ConfigError("monitor.dir: not set, so the run wrote nothing to summarise.")
    print(learned(config, read_points(config.monitor.dir)))
    print(f"Beside Muon with data parallelism\n{comparison(config.monitor.dir, baseline)}")
    sample = text_of(config.monitor.dir, SAMPLE_TAG)
    if sample is not None:
        print(f"A sample from the anchor:\n{sample}")
    print(f"Curves: tensorboard --logdir {config.monitor.dir}")


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Summarise a finished run.")
    parser.add_argument("--config", default="configs/cpu_k2.yaml", help="config of the run")
    parser.add_argument(
        "--baseline", type=Path, default=BASELINE, help="directory of the run to compare with"
    )
    arguments = parser.parse_args(argv)
    return run_tool(lambda: summarise(arguments.config, arguments.baseline))


if __name__ == "__main__":
    sys.exit(main())
