"""The page of the study: tables of the cosine over K, and the verdict on claim (d)."""

import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean

from tools.bench.quality.statistics import Interval, interval
from tools.pseudogradient.drawing import Panel, draw_over_replicas
from tools.pseudogradient.study import METHODS, Row

__all__ = ["write_page"]

_INTRODUCTION = """Claim (d): *the cosine to the K = 1 pseudogradient falls with K and is higher for
Muon at every K.* Here K replicas train H inner steps from the same weights and inner optimizer
state, on the same global batches that one replica trains on. The cosine is that of the mean
pseudogradient of the K replicas to the pseudogradient of the one, for each of the matrices that
Muon updates; tables give the mean over matrices. Intervals are Student's 95 % intervals over the
seeds; differences are paired by seed. The [guide](../guides/pseudogradients.md) has the commands
and defines every measure."""

_PAPER = """The MuLoCo paper's figure (416M parameters, H = 30, after 720 steps) has 0.72, 0.66,
0.54, 0.41 for MuLoCo and 0.60, 0.56, 0.42, 0.185 for DiLoCo at K = 2, 4, 8, 16, read off the
figure. The model, batch and data here are far smaller, so only signs and order are comparable."""

_MEASURES = {
    "cosine_mean": "cosine to K = 1",
    "pairwise_mean": "cosine of two replicas",
    "top5_gap_mean": "top-5 % gap, %",
    "alignment": "alignment rho",
    "step_norm_spread": "spread of step norms",
}


def write_page(rows: Sequence[Row], path: Path) -> str:
    """Write the page and its figure beside it; return the text."""
    parts = ["# Pseudogradients over K", _INTRODUCTION, _PAPER, *_verdicts(rows)]
    for warm, steps in _settings(rows):
        found = _of_setting(rows, warm, steps)
        title = _start(warm, steps)
        parts += [f"## {title[0].upper()}{title[1:]}", _cosines(found), _measures(found)]
    figure = path.with_suffix(".png")
    parts += [
        f"![cosine over K]({figure.name})",
        "Points are means over matrices and seeds, whiskers the lowest and the highest matrix of "
        "any seed.",
        "## How",
        _facts(rows),
    ]
    text = "\n\n".join(parts) + "\n"
    path.write_text(text, encoding="utf-8")
    _draw(rows, figure)
    return text


# ---- the claim -----------------------------------------------------------------------------------


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """Return the section with the verdict: in words, then a row a setting."""
    lines = ["| start, H | falls with K | higher for Muon | lower for Muon | undecided |"]
    lines.append("|---|---|---|---|---|")
    falls: list[bool] = []
    counts = {"higher": 0, "lower": 0, "undecided": 0}
    everywhere = 0
    for warm, steps in _settings(rows):
        found = _of_setting(rows, warm, steps)
        falling = [_falls(found, method) for method in METHODS]
        answers: dict[str, list[str]] = {answer: [] for answer in counts}
        for K in (K for K in _replicas(found) if K > 1):
            if (ahead := _ahead(found, K)) is not None:
                answers[_sign(ahead)].append(f"{K}: {_signed(ahead)}")
        falls += [answer for answer in falling if answer is not None]
        everywhere += bool(answers["higher"]) and not answers["lower"] + answers["undecided"]
        for answer, cells in answers.items():
            counts[answer] += len(cells)
        cells = [_start(warm, steps), _all(falling)]
        cells += ["; ".join(answers[answer]) or "-" for answer in counts]
        lines.append(f"| {' | '.join(cells)} |")
    settings = len(_settings(rows))
    holds = bool(falls) and all(falls) and everywhere == settings
    words = (
        f"**Claim (d) {'holds' if holds else 'does not hold in full'} on this model.** "
        f"**The cosine falls with K** in {sum(falls)} of {len(falls)} cases (a case is a setting "
        "of start and H and an inner optimizer): that of every K is below that of the next smaller "
        f"one, in every seed. **It is higher for Muon at every K** in {everywhere} of {settings} "
        f"settings. Of the {sum(counts.values())} paired differences it is higher for Muon in "
        f"{counts['higher']}, lower in {counts['lower']}, and undecided in {counts['undecided']}, "
        "where the interval holds zero."
    )
    note = (
        "Entries are *K: cosine of MuLoCo minus that of DiLoCo*, with the interval. One learning "
        "rate of each optimizer was used for every K; no other was tried."
    )
    return ["## Verdict", words, "\n".join(lines), note]


def _sign(of: Interval) -> str:
    if of.low > 0:
        return "higher"
    return "lower" if of.high < 0 else "undecided"


def _falls(rows: Sequence[Row], method: str) -> bool | None:
    """Return whether the cosine falls at every doubling in every seed; ``None`` without rows."""
    own = {(r.seed, r.replicas): r.number("cosine_mean") for r in rows if r.method == method}
    seeds, replicas = {seed for seed, _ in own}, sorted({K for _, K in own})
    if len(replicas) < 2 or len(own) != len(seeds) * len(replicas):
        return None
    return all(
        own[seed, larger] < own[seed, smaller]
        for seed in seeds
        for smaller, larger in pairwise(replicas)
    )


def _ahead(rows: Sequence[Row], K: int) -> Interval | None:
    """Return cosine of MuLoCo minus that of DiLoCo, paired by seed; ``None`` without pairs."""
    by_method = {
        method: {
            r.seed: r.number("cosine_mean") for r in rows if (r.method, r.replicas) == (method, K)
        }
        for method in METHODS
    }
    ours, theirs = by_method["muloco"], by_method["diloco"]
    seeds = sorted(set(ours) & set(theirs))
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None


def _all(answers: Sequence[bool | None]) -> str:
    if None in answers:
        return "n/a"
    return "yes" if all(answers) else "no"


# ---- settings ------------------------------------------------------------------------------------


def _settings(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """Return pairs of warm-up and H, the longest first."""
    return sorted({(row.warm_steps, row.interval) for row in rows}, reverse=True)


def _of_setting(rows: Sequence[Row], warm: int, steps: int) -> list[Row]:
    return [row for row in rows if (row.warm_steps, row.interval) == (warm, steps)]


def _start(warm: int, steps: int) -> str:
    return f"{f'after {warm} steps' if warm else 'initial weights'}, H = {steps}"


# ---- tables and figure ---------------------------------------------------------------------------


def _cosines(rows: Sequence[Row]) -> str:
    lines = ["| K | MuLoCo | DiLoCo | MuLoCo - DiLoCo, paired |", "|---|---|---|---|"]
    for K in _replicas(rows):
        cells = []
        for method in METHODS:
            values = _values(rows, method, K, "cosine_mean")
            cells.append(f"{interval(values).mean:.3f}" if values else "n/a")
        ahead = _ahead(rows, K) if K > 1 else None
        lines.append(f"| {K} | {' | '.join(cells)} | {_signed(ahead) if ahead else '-'} |")
    return "\n".join(lines)


def _measures(rows: Sequence[Row]) -> str:
    lines = ["| method, K | " + " | ".join(_MEASURES.values()) + " | nuclear norm kept |"]
    lines.append("|---" * (len(_MEASURES) + 2) + "|")
    for method in METHODS:
        for K in _replicas(rows):
            cells = []
            for column in _MEASURES:
                values = _values(rows, method, K, column)
                cells.append(f"{fmean(values):.3g}" if values else "n/a")
            means = _values(rows, method, K, "nuclear_mean")
            own = _values(rows, method, K, "nuclear_replica")
            cells.append(f"{fmean(means) / fmean(own):.3g}" if own else "n/a")
            lines.append(f"| {method}, {K} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(rows: Sequence[Row], path: Path) -> None:
    panels = []
    for warm, steps in _settings(rows):
        found = _of_setting(rows, warm, steps)
        series = {
            method: {
                K: (
                    fmean(_values(found, method, K, "cosine_mean")),
                    min(_values(found, method, K, "cosine_min")),
                    max(_values(found, method, K, "cosine_max")),
                )
                for K in _replicas(found)
                if _values(found, method, K, "cosine_mean")
            }
            for method in METHODS
        }
        panels.append(Panel(f"cosine to K = 1, {_start(warm, steps)}", series))
    draw_over_replicas(panels, path)


def _values(rows: Sequence[Row], method: str, K: int, column: str) -> list[float]:
    own = [row for row in rows if (row.method, row.replicas) == (method, K)]
    return [row.number(column) for row in own if row.values[column]]


def _replicas(rows: Sequence[Row]) -> list[int]:
    return sorted({row.replicas for row in rows})


def _signed(of: Interval) -> str:
    if of.count < 2:
        return f"{of.mean:+.3f} (one seed)"
    return f"{of.mean:+.3f} ({of.low:+.3f} to {of.high:+.3f})"


def _facts(rows: Sequence[Row]) -> str:
    def every(column: str) -> str:
        return ", ".join(sorted({row.values[column] for row in rows}))

    rates = sorted({(row.method, row.values["inner.lr"]) for row in rows})
    return (
        f"{len(rows)} rows, seeds {every('seed')}, commit {every('commit')}, finished "
        f"{max(row.values['finished'] for row in rows)}. Learning rates: "
        f"{', '.join(f'{method} {lr}' for method, lr in rates)}; global batch "
        f"{every('training.global_batch_size')} sequences; {every('matrices')} matrices; "
        f"one core of {platform.machine()}. Model, data and schedule: "
        "`tools/pseudogradient/small.yaml`."
    )
