"""The commands `saved` and `branches`: measure, then write tables, figures and a section."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_muloco.config import RunConfig, load_config
from megatron_muloco.config.inner import MuonInner, learning_rate
from megatron_muloco.config.outer import NoOuter
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.pseudogradients import SavedRound, SavedRounds
from tools.pseudogradient.drawing import Spectra, draw_outer, draw_over_replicas, draw_spectra
from tools.pseudogradient.layers import LayerMeasures, measure_layers
from tools.pseudogradient.measures import autocorrelation, mean_of, outer_rounds, spectrum
from tools.pseudogradient.report import panels, section, write_layers, write_rounds

__all__ = ["analyse_branches", "analyse_saved"]

LAGS = 10
"""Largest lag of the autocorrelations, in rounds."""


# ---- rounds of a run -----------------------------------------------------------------------------


def analyse_saved(directory: Path, reference: Path | None, matrix: str, out: Path) -> str:
    """Analyse the rounds that a run has saved; return the Markdown section, which is also written.

    Args:
        directory: ``monitor.save_pseudogradients.dir`` of the run.
        reference: That of a run of K = 1 from the same anchor, for the cosine to it.
        matrix: Part of the name of the matrix whose spectra are drawn; the last one by default.
        out: Directory of the tables and figures.

    Raises:
        ConfigError: Nothing is saved, or files are missing or damaged.
    """
    run = SavedRounds(directory)
    numbers = run.rounds()
    if not numbers:
        raise ConfigError(f"{directory} has no rounds yet. Let the run reach the end of one.")
    single = SavedRounds(reference) if reference else None
    if single is not None and single.topology.num_replicas != 1:
        raise ConfigError(f"{reference} is a run of {single.topology.num_replicas} replicas, not 1")
    out.mkdir(parents=True, exist_ok=True)
    measured: dict[int, list[LayerMeasures]] = {}
    means: list[Tensor] = []
    for number in numbers:
        found = run.load(number)
        baseline = single.load(number).matrices[0] if single and number in single.rounds() else None
        measured[number] = measure_layers(
            found.matrices, baseline, _by_step(found), _rates(run.config, found)
        )
        means.append(_flat_mean(found))
    write_layers(out / "layers.csv", ["round"], {(str(n),): each for n, each in measured.items()})
    last = run.load(numbers[-1])
    draw_spectra([_spectra(last.matrices, matrix, f"round {numbers[-1]}")], out / "spectra.png")
    figures = ["spectra.png"]
    note = _outer(run.config, numbers, means, out)
    figures += ["momentum.png"] if (out / "momentum.png").exists() else []
    rows = {f"round {number}": layers for number, layers in measured.items()}
    replicas = run.topology.num_replicas
    text = section(f"Rounds of {run.config.inner.kind}, K = {replicas}", rows, figures, note)
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _outer(config: RunConfig, numbers: Sequence[int], means: Sequence[Tensor], out: Path) -> str:
    """Write the diagnostics of the outer optimizer; return them in a sentence."""
    outer = config.outer
    if isinstance(outer, NoOuter) or list(numbers) != list(range(1, len(numbers) + 1)):
        return (
            "Outer momentum: n/a, because it is the sum of all rounds so far, and not all of them "
            "from the first on are saved."
        )
    lr, momentum = (
        [rate if isinstance(rate, float) else rate(number) for number in numbers]
        for rate in (outer.lr, outer.momentum)
    )
    rounds, momenta = outer_rounds(means, lr, momentum)
    write_rounds(out / "rounds.csv", rounds)
    lags = range(1, min(LAGS, len(means) - 1) + 1)
    correlations = {
        "pseudogradient": [autocorrelation(means, lag) for lag in lags],
        "outer momentum": [autocorrelation(momenta, lag) for lag in lags],
    }
    draw_outer(rounds, correlations, out / "momentum.png")
    end = rounds[-1]
    text = (
        f"Outer step of round {end.round_index}: aligned gain {end.aligned_gain:.3g}, transverse "
        f"ratio {end.transverse_ratio:.3g}."
    )
    if not lags:
        return text
    first = ", ".join(f"{label} {values[0]:.3f}" for label, values in correlations.items())
    return f"{text} Autocorrelation at lag 1: {first}."


def _flat_mean(found: SavedRound) -> Tensor:
    """Return the mean pseudogradient of all parameters as one vector, fp64."""
    flat = [
        torch.cat([each.flatten() for each in (*matrices.values(), *vectors.values())])
        for matrices, vectors in zip(found.matrices, found.vectors, strict=True)
    ]
    return mean_of(flat)


def _by_step(found: SavedRound) -> list[list[dict[str, Tensor]]]:
    """Return replica -> inner step -> matrix -> what the step subtracted."""
    return [
        [
            {name: tensor[index] for name, tensor in replica.items()}
            for index in range(len(next(iter(replica.values()))))
        ]
        for replica in found.steps
    ]


def _rates(config: RunConfig, found: SavedRound) -> list[float]:
    """Return the learning rates of the round's steps where Muon's form of the norm applies."""
    inner, outer, iters = config.inner, config.outer, config.training.train_iters
    plain = isinstance(inner, MuonInner) and inner.muon.scale_mode == "unit_rms_norm"
    if not found.steps or not plain or iters is None or isinstance(outer, NoOuter):
        return []
    if not isinstance(outer.sync_interval, int):
        return []
    first = (found.round_index - 1) * outer.sync_interval
    return [learning_rate(inner, iters, first + t) for t in range(1, outer.sync_interval + 1)]


# ---- branches ------------------------------------------------------------------------------------


def analyse_branches(
    config: Path,
    overrides: Sequence[str],
    inners: Sequence[str],
    replicas: Sequence[int],
    warm_steps: int,
    interval: int,
    matrix: str,
    out: Path,
) -> str:
    """Branch a run into K replicas for each K; return the Markdown section, which is also written.

    Args:
        config: Configuration of the run; its number of replicas is replaced.
        overrides: Keys to override, ``key=value``.
        inners: Inner optimizers with their learning rates, ``muon:0.044``; the configuration's own
            if empty.
        replicas: Values of K.
        warm_steps: Inner steps of one replica before the branches.
        interval: H.
        matrix: Part of the name of the matrix whose spectra are drawn; the last one by default.
        out: Directory of the tables and figures.

    Raises:
        ConfigError: A K does not divide the batch, or the configuration cannot run here.
    """
    from tools.pseudogradient.branches import branch, rates_of, warm_up

    out.mkdir(parents=True, exist_ok=True)
    measured: dict[str, dict[int, list[LayerMeasures]]] = {}
    spectra: list[Spectra] = []
    largest = max(replicas)
    for inner in inners or [""]:
        runs = {
            K: _branch_config(config, overrides, inner, K, warm_steps + interval)
            for K in sorted({1, *replicas})
        }
        kind = runs[1].inner.kind
        start = warm_up(runs[1], warm_steps)
        rates = rates_of(runs[1], warm_steps, interval) if kind == "muon" else []
        reference = None
        for K, run in runs.items():
            found = branch(run, start, [interval], keep_steps=True)
            own = found.pseudogradients[interval]
            reference = own[0] if K == 1 else reference
            layers = measure_layers(own, reference, found.steps, rates)
            measured.setdefault(kind, {})[K] = layers
            if largest == K:
                spectra.append(_spectra(own, matrix, f"{kind}, K = {K}"))
    entries = {(k, str(K)): layers for k, by_K in measured.items() for K, layers in by_K.items()}
    write_layers(out / "layers.csv", ["inner", "replicas"], entries)
    draw_over_replicas(panels(measured), out / "replicas.png")
    draw_spectra(spectra, out / "spectra.png")
    rows = {f"{kind}, K = {K}": layers for (kind, K), layers in entries.items()}
    title = f"Branches after {warm_steps} steps, H = {interval}"
    text = section(title, rows, ["replicas.png", "spectra.png"], "")
    (out / "report.md").write_text(text, encoding="utf-8")
    return text


def _branch_config(
    config: Path, overrides: Sequence[str], inner: str, replicas: int, shortest: int
) -> RunConfig:
    """Return the configuration of one branch; each replica takes one microbatch a step."""
    keys = list(overrides)
    if inner:
        kind, colon, lr = inner.partition(":")
        if not colon:
            raise ConfigError(f"--inner {inner} is not of the form muon:0.044.")
        keys += [f"inner.kind={kind}", f"inner.lr={lr}"]
    found = load_config(config, [*keys, "parallel.num_replicas=1"])
    batch, iters = found.training.global_batch_size, found.training.train_iters
    if batch % replicas:
        raise ConfigError(f"{replicas} replicas do not divide training.global_batch_size {batch}.")
    if iters is None or iters < shortest:
        raise ConfigError(
            f"training.train_iters is {iters}, and the branches end after step {shortest}. Use "
            f"--set training.train_iters={shortest}; learning rates decay over these steps unless "
            "inner.lr_decay_style is constant."
        )
    micro = f"training.micro_batch_size={batch // replicas}"
    return load_config(config, [*keys, f"parallel.num_replicas={replicas}", micro])


def _spectra(replicas: Sequence[Mapping[str, Tensor]], matrix: str, title: str) -> Spectra:
    """Return the spectra of the last matrix whose name contains ``matrix``."""
    names = [name for name in replicas[0] if matrix in name]
    if not names:
        raise ConfigError(f"--matrix: no matrix has {matrix!r} in its name: {list(replicas[0])}.")
    own = [replica[names[-1]] for replica in replicas]
    floor = float(spectrum(own[0])[0]) * 1e-9  # zeros have no place on a logarithmic axis

    def values(of: Tensor) -> list[float]:
        return [value if value > floor else math.nan for value in spectrum(of).tolist()]

    return Spectra(f"{title}\n{names[-1]}", [values(each) for each in own], values(mean_of(own)))
