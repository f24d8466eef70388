"""`Campaign`: the list of runs and the files of their readings.

Every run writes one file, so an interrupted campaign resumes where it stopped.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .commands import Link
from .lab import Lab, LabError
from .methods import CONFIG, OVERLAP, RANKS, SYNC_INTERVAL, TABLE, Method, Sizes, overrides
from .probe import ALLOWED, echoes, off_by, probe, wrong_echoes
from .readings import Links, Reading, Window, load, read_run, store
from .runs import run_ranks

__all__ = ["Campaign", "measure", "overlap", "train", "whole"]

_WARM_UP_STEPS = 4  # chosen: of a data-parallel run; the first allocates, TCP finds its rate
_PROBES = 3  # chosen: a machine may be busy for a moment; three times in a row is no accident


@dataclass(frozen=True)
class Campaign:
    """Settings of a comparison of methods.

    Attributes:
        out: Directory of readings, logs and event files.
        methods: Names of the methods that run; empty for all.
        rates: Rates of the table, in Mbit/s.
        overlap_rate: Rate of the comparison of blocking and overlapped outer steps.
        whole_rate: Rate of the run that is done wholly on shaped links.
        seeds: Seeds; the first is the table's, all are used to compare losses under overlap.
        steps: Inner steps of a training.
        batch: Sequences of a step, over all ranks.
        dp_steps: Measured steps of data-parallel methods.
        rounds: Measured rounds of the other methods.
        link: Delay and loss of every shaped link.
        timeout: Time limit of one run, in seconds.
        commit: Commit of the program.
    """

    out: Path
    methods: tuple[str, ...]
    rates: tuple[float, ...]
    overlap_rate: float
    whole_rate: float
    seeds: tuple[int, ...]
    steps: int
    batch: int
    dp_steps: int
    rounds: int
    link: Link
    timeout: float
    commit: str

    def wants(self, method: Method) -> bool:
        """Whether a method was asked for."""
        return not self.methods or method.name in self.methods

    def trained(self, method: Method, seed: int) -> Path:
        """Where the reading of a training is kept."""
        return self.out / "train" / f"{method.name}-s{seed}.json"

    def measured(self, method: Method, mbit: float | None) -> Path:
        """Where the reading of a measurement is kept."""
        return self.out / "measure" / f"{method.name}-{self.shaped(mbit).name}.json"

    def whole(self, method: Method) -> Path:
        """Where the reading of a whole training on shaped links is kept."""
        return self.out / "whole" / f"{method.name}-{self.shaped(self.whole_rate).name}.json"

    def shaped(self, mbit: float | None) -> Link:
        """Return the links of a rate; unshaped ones are neither delayed nor lossy."""
        return Link(mbit, *(() if mbit is None else (self.link.delay_ms, self.link.loss)))


def train(campaign: Campaign) -> None:
    """Train every method once on unshaped links, and those of the overlap bar with every seed.

    Not in bf16, which takes a CPU many times as long: the report takes the curve of the same method
    in fp32, and says so.
    """
    for method, seed in _trainings(campaign):
        sizes = Sizes(campaign.steps, campaign.batch, SYNC_INTERVAL, seed)
        window = Window(SYNC_INTERVAL, campaign.steps)
        _reading(campaign, campaign.trained(method, seed), method, sizes, window, None)


def _trainings(campaign: Campaign) -> Iterator[tuple[Method, int]]:
    first = campaign.seeds[0]
    wanted = [(m, first) for m in TABLE if not m.is_bf16] + [
        (m, s) for s in campaign.seeds for m in OVERLAP
    ]
    for method, seed in dict.fromkeys(wanted):
        if campaign.wants(method):
            yield method, seed


def measure(campaign: Campaign) -> None:
    """Time the methods of the table on unshaped links and at every rate.

    Raises:
        LabError: What was learnt depended on the link.
    """
    for method in filter(campaign.wants, TABLE):
        _short_runs(campaign, method, (None, *campaign.rates))


def overlap(campaign: Campaign) -> None:
    """Time blocking and overlapped outer steps at the rate of their comparison."""
    for method in filter(campaign.wants, OVERLAP):
        _short_runs(campaign, method, (None, campaign.overlap_rate))


def whole(campaign: Campaign) -> None:
    """Train plain MuLoCo wholly on shaped links.

    Raises:
        LabError: It learnt something else than on unshaped ones.
    """
    method, seed = OVERLAP[0], campaign.seeds[0]
    sizes = Sizes(campaign.steps, campaign.batch, SYNC_INTERVAL, seed)
    window = Window(SYNC_INTERVAL, campaign.steps)
    path = campaign.whole(method)
    reading = _reading(campaign, path, method, sizes, window, campaign.whole_rate)
    unshaped = load(campaign.trained(method, seed))
    if unshaped is not None:
        _same_digests([unshaped, reading])


def _short_runs(campaign: Campaign, method: Method, rates: Sequence[float | None]) -> None:
    steps, window = _extent(campaign, method)
    sizes = Sizes(steps, campaign.batch, 0, campaign.seeds[0])
    _same_digests(
        [
            _reading(campaign, campaign.measured(method, mbit), method, sizes, window, mbit)
            for mbit in rates
        ]
    )


def _extent(campaign: Campaign, method: Method) -> tuple[int, Window]:
    """Return the steps of a short run, and those that are measured.

    The first round is a warm-up. With overlap, one more round follows: the flush at the end of a
    run is no part of a usual round.
    """
    if method.is_data_parallel:
        last = _WARM_UP_STEPS + campaign.dp_steps
        return last, Window(_WARM_UP_STEPS, last)
    last = SYNC_INTERVAL * (1 + campaign.rounds)
    closing = SYNC_INTERVAL if method.overlaps else 0
    return last + closing, Window(SYNC_INTERVAL, last)


def _reading(
    campaign: Campaign,
    path: Path,
    method: Method,
    sizes: Sizes,
    window: Window,
    mbit: float | None,
) -> Reading:
    """Return the stored reading of this run, or make it."""
    directory = campaign.out / "runs" / path.parent.name / path.stem
    changes = overrides(method, sizes, str(directory / "events"))
    kept = load(path)
    if kept is not None and (kept.changes, kept.window) == (list(changes), window):
        print(f"{path}: kept", flush=True)
        return kept
    print(f"{path}: {method.title}, {sizes.steps} steps", flush=True)
    with Lab(RANKS, campaign.shaped(mbit)) as lab:
        links = _checked(lab)
        run = run_ranks(lab, CONFIG, changes, directory, timeout=campaign.timeout)
        reading = read_run(
            run,
            links,
            method=method.name,
            changes=changes,
            window=window,
            commit=campaign.commit,
        )
    store(path, reading)
    return reading


def _checked(lab: Lab) -> Links:
    """Return the achieved rate of every link.

    Raises:
        LabError: A rate is not as asked for.
    """
    for _ in range(_PROBES):
        achieved = [] if lab.link.mbit is None else probe(lab)
        echoed = echoes(lab) if lab.link.is_impaired else None
        wrong = ""
        if achieved and off_by(achieved, lab.link.mbit, lab.link.loss) > ALLOWED:
            wrong = f"a rate is more than {ALLOWED:.0%} off: {achieved}"
        elif echoed is not None:
            wrong = wrong_echoes(echoed, lab.link)
        if not wrong:
            return Links(
                mbit=lab.link.mbit,
                delay_ms=lab.link.delay_ms,
                loss=lab.link.loss,
                impaired_by=lab.impaired_by,
                achieved=[(link.up, link.down) for link in achieved],
                round_trip_ms=[] if echoed is None else echoed.round_trip_ms,
                congestion_control=lab.congestion_control,
            )
    raise LabError(
        f"links {lab.link.name} are something else, {_PROBES} times in a row; {wrong}. Measure on "
        "a quiet machine, at a rate that it can shape."
    )


def _same_digests(readings: Sequence[Reading]) -> None:
    digests = {reading.digest for reading in readings}
    if len(digests) > 1:
        rates = ", ".join(f"{r.link.name}: {r.digest}" for r in readings)
        raise LabError(f"{readings[0].method} learnt different things on different links: {rates}")
