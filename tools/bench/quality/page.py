"""Result page of the campaign, computed from the runs that have finished."""

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from textwrap import fill

from tools.bench.quality.grid import COMPARISONS, INTERVALS, METHODS, VARIANTS, Comparison, Rule
from tools.bench.quality.runs import Result
from tools.bench.quality.statistics import (
    CONFIDENCE,
    EQUAL_PERCENT,
    Interval,
    Losses,
    does_not_fall,
    interval,
    percent_differences,
    rise,
    rises_less,
    verdict,
)

SWEEPS = {method: [f"{method}-h{length}" for length in INTERVALS] for method in METHODS}
"""Method -> variants in the order of H."""

MARKDOWN_COLUMNS = 120
INTRODUCTION = f"""Two replicas train the model of `tools/bench/quality/small.yaml` on the
demo's text, both in one process of one thread, which gives the bits of two ranks. A seed sets
the initial weights and the order of samples, so runs of one seed are paired. Loss is that of the
anchor on held-out text after the last step, nats per token. How learning rates were chosen is in
the [log](../experiments/LOG.md).

Differences are 100 x (variant - baseline) / baseline per seed, then their mean with Student's
{CONFIDENCE:.0%} interval. *Equal* is shown where |mean| is at most {EQUAL_PERCENT} %, *no worse*
where the mean is at most +{EQUAL_PERCENT} %, *better* where the whole interval is below zero. Few
seeds make wide intervals: a mean within the rule whose interval reaches beyond it follows the rule,
and is no proof."""


def losses_of(results: Sequence[Result]) -> Losses:
    """Return variant -> seed -> loss."""
    table: dict[str, dict[int, float]] = {}
    for result in results:
        table.setdefault(result.variant, {})[result.seed] = result.loss
    return table


def page(results: Sequence[Result], command: str, drawing: str | None) -> str:
    """Return the whole page; ``drawing`` is the image beside it, if there is one."""
    losses = losses_of(results)
    parts = [
        "# Quality of outer steps on real text",
        f"`{command}`",
        INTRODUCTION,
        "## Claims",
        _table(
            ("variant", "against", "per seed, %", "mean, %", "interval, %", "claim", "verdict"),
            [_comparison_row(losses, comparison) for comparison in COMPARISONS],
        ),
        "## Length of a round",
        _sweep(losses, _sweep_steps(results)),
        f"![losses]({drawing})" if drawing else "",
        "## All losses",
        _table(
            ("variant", "mean loss", "per seed", "sent by a rank"),
            [_loss_row(name, results) for name in VARIANTS if name in losses],
        ),
        "## Variants",
        "What each replaces in `tools/bench/quality/small.yaml`:",
        "\n".join(_keys(name) for name in VARIANTS if VARIANTS[name]),
        "## How",
        _facts(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _comparison_row(losses: Losses, comparison: Comparison) -> tuple[object, ...]:
    found = list(percent_differences(losses, comparison.variant, comparison.baseline).values())
    names, claim = (comparison.variant, comparison.baseline), comparison.rule.value
    if not found:
        return (*names, "", "not run", "", claim, "not run")
    of = interval(found)
    each = ", ".join(f"{difference:+.2f}" for difference in found)
    return (*names, each, f"{of.mean:+.2f}", _ends(of), claim, _said(comparison, of))


def _said(comparison: Comparison, difference: Interval) -> str:
    """Return the verdict, with a remark where seeds are missing."""
    answer, seeds = verdict(comparison.rule, difference), comparison.seeds
    complete = comparison.rule is Rule.SHOWN or difference.count >= seeds
    return answer if complete else f"{answer}; {difference.count} of {seeds} seeds"


def _ends(of: Interval) -> str:
    return f"{of.low:+.2f} to {of.high:+.2f}" if of.count > 1 else "one seed"


def _sweep(losses: Losses, steps: int) -> str:
    rows = [
        _length_row(losses, method, place, steps)
        for method, names in SWEEPS.items()
        for place in range(len(names))
        if losses.get(names[place])
    ]
    if not rows:
        return "Not run."
    head = (
        "method",
        "H",
        "rounds",
        "loss per seed",
        "mean",
        "above the H before, %",
        "interval, %",
    )
    return "\n\n".join((_table(head, rows), _growth(losses), _rises(losses)))


def _length_row(losses: Losses, method: str, place: int, steps: int) -> tuple[object, ...]:
    name = SWEEPS[method][place]
    each = ", ".join(f"{loss:.4f}" for _, loss in sorted(losses[name].items()))
    length = INTERVALS[place]
    head = (method, length, steps // length, each, f"{_mean(losses, name):.4f}")
    before = SWEEPS[method][place - 1] if place else name
    found = list(percent_differences(losses, name, before).values())
    if not place or not found:
        return (*head, "", "")
    return (*head, f"{interval(found).mean:+.2f}", _ends(interval(found)))


def _growth(losses: Losses) -> str:
    lines = []
    for method, names in SWEEPS.items():
        found = list(rise(losses, names).values())
        grows = does_not_fall(losses, names)
        answer = "not run for every H" if grows is None else ("no" if grows else "yes")
        lines.append(
            f"- {method}: does the mean loss fall by more than {EQUAL_PERCENT} % anywhere? {answer}"
        )
        if found:
            of, each = interval(found), ", ".join(f"{value:+.2f}" for value in found)
            lines.append(
                f"- {method}: rise from H = {INTERVALS[0]} to {INTERVALS[-1]}, %: {of.mean:+.2f} "
                f"({_ends(of)}; per seed {each})"
            )
    return "\n".join(lines)


def _sweep_steps(results: Sequence[Result]) -> int:
    """Return the length of the sweep's runs, 0 without any."""
    names = {name for names in SWEEPS.values() for name in names}
    return max((result.iterations for result in results if result.variant in names), default=0)


def _rises(losses: Losses) -> str:
    apart = rises_less(losses, SWEEPS["muloco"], SWEEPS["diloco"])
    if apart is None:
        return "MuLoCo's rise against DiLoCo's: not run."
    answer = "no larger" if apart.mean <= 0 else "larger"
    return (
        f"MuLoCo's rise minus DiLoCo's: {apart.mean:+.2f} percentage points "
        f"({_ends(apart)}), so it is **{answer}** in the mean."
    )


def _loss_row(name: str, results: Sequence[Result]) -> tuple[object, ...]:
    runs = sorted((r for r in results if r.variant == name), key=lambda r: r.seed)
    each = ", ".join(f"{run.loss:.4f}" for run in runs)
    mean = sum(run.loss for run in runs) / len(runs)
    return (name, f"{mean:.4f}", each, f"{runs[0].bytes_sent / 1e6:.2f} MB")


def _keys(name: str) -> str:
    text = f"- {name}: " + ", ".join(f"`{key}`" for key in VARIANTS[name])
    return fill(text, MARKDOWN_COLUMNS, subsequent_indent="  ", break_long_words=False)


def _facts(results: Sequence[Result]) -> str:
    steps = sorted({result.iterations for result in results})
    seeds = sorted({result.seed for result in results})
    seconds = [result.seconds for result in results]
    rows = [
        ("runs", f"{len(results)}, of {', '.join(map(str, steps))} steps, seeds {seeds}"),
        ("machine", f"{platform.machine()}, one thread a run"),
        ("seconds of a run", f"{min(seconds):.0f} to {max(seconds):.0f}, machine shared"),
        (
            "versions",
            f"Python {platform.python_version()}, torch {version('torch')}, "
            f"megatron-core {version('megatron-core')}",
        ),
        ("commit", results[0].commit),
        ("date", f"{datetime.now(UTC):%Y-%m-%d}"),
    ]
    return _table(("quantity", "value"), rows)


def _mean(losses: Losses, name: str) -> float:
    return interval(list(losses[name].values())).mean


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
