"""Trains variants and seeds, two at a time, and stores one JSON file a run.

Both replicas of a run share a process of one thread (`training.one_process`); their losses are
those of two ranks, bit for bit. A worker process imports the program once and trains one run after
the other. A run whose file exists is not repeated, so an interrupted campaign resumes where it
stopped. A file made with other settings is refused. So is one of another commit: rows of a page
are of one version of the program.
"""

import json
import multiprocessing
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import yaml

from megatron_muloco.errors import ConfigError
from tools.bench.provenance import program_commit

CONFIG = Path(__file__).with_name("small.yaml")
WORKER_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Task:
    """One run to make.

    Attributes:
        variant: Name in the grid.
        seed: Seed of weights and of the order of samples.
        keys: Keys that the variant replaces.
    """

    variant: str
    seed: int
    keys: tuple[str, ...]

    def __str__(self) -> str:
        """Return the name of the run."""
        return f"{self.variant}, seed {self.seed}"


@dataclass(frozen=True)
class Result:
    """One finished run.

    Attributes:
        variant: Name in the grid.
        seed: Seed of weights and of the order of samples.
        settings: Keys replaced, as given to the program.
        config_digest: Digest of the file whose keys were replaced.
        iterations: Inner step of the last evaluation.
        loss: Held-out loss of the anchor at that step, nats per token.
        initial_loss: Held-out loss before the first step.
        bytes_sent: Bytes that rank 0 of two ranks would send in all outer steps.
        seconds: Wall time of the run on one core, without the start of its worker.
        commit: Last commit that changed the program.
    """

    variant: str
    seed: int
    settings: tuple[str, ...]
    config_digest: str
    iterations: int
    loss: float
    initial_loss: float
    bytes_sent: int
    seconds: float
    commit: str


def config_digest() -> str:
    """Return a digest of the base configuration; comments do not change it."""
    values = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def settings_of(keys: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return the keys of a run: those of the variant and the seed."""
    return (*keys, f"training.seed={seed}", f"data.seed={seed}")


def path_of(out: Path, variant: str, seed: int) -> Path:
    """Return the file of a run."""
    return out / f"{variant}-seed{seed}.json"


def read_result(out: Path, variant: str, seed: int, keys: Sequence[str]) -> Result | None:
    """Return a finished run, ``None`` where there is none.

    Raises:
        ConfigError: The file was made with other settings.
    """
    path = path_of(out, variant, seed)
    if not path.exists():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    result = Result(**{**values, "settings": tuple(values["settings"])})
    if (result.settings, result.config_digest) != (settings_of(keys, seed), config_digest()):
        raise ConfigError(
            f"{path}: made with other settings than {variant} has now, so it cannot stand beside "
            "the others. Remove it, or choose another --out."
        )
    return result


def clean_commit() -> str:
    """Return the commit that new runs belong to.

    Raises:
        ConfigError: The program differs from its commit, so nobody could repeat the runs.
    """
    commit = program_commit()
    if commit.endswith("+"):
        raise ConfigError(
            f"the program differs from commit {commit[:-1]}, so its runs could not be repeated. "
            "Commit the changes first."
        )
    return commit


def require_one_commit(results: Sequence[Result], commit: str | None = None) -> None:
    """Raise unless all results are of one commit.

    Args:
        results: Results that will stand on one page.
        commit: That commit; None allows any.

    Raises:
        ConfigError: Some results are of another commit.
    """
    expected = {commit} if commit else {result.commit for result in results}
    if len(expected) == 1 and all(result.commit in expected for result in results):
        return
    kinds = sorted({result.commit for result in results})
    counts = [f"{sum(r.commit == kind for r in results)} of {kind}" for kind in kinds]
    now = f", and the program is {commit}" if commit else ""
    raise ConfigError(
        f"--out: has runs of other commits ({', '.join(counts)}{now}), which cannot stand on one "
        "page. Choose another --out, or replace them with --fresh."
    )


def train(task: Task, commit: str) -> Result:
    """Train one run in this process."""
    from megatron_muloco.runtime.distributed import silence_known_warnings

    silence_known_warnings()  # before Megatron is imported, which warns
    from megatron_muloco.config import load_config
    from megatron_muloco.training.one_process import run_in_one_process

    settings, started = settings_of(task.keys, task.seed), time.perf_counter()
    outcome = run_in_one_process(load_config(CONFIG, settings), writes=False)
    held_out = outcome.held_out
    return Result(
        variant=task.variant,
        seed=task.seed,
        settings=settings,
        config_digest=config_digest(),
        iterations=max(held_out),
        loss=held_out[max(held_out)],
        initial_loss=held_out[0],
        bytes_sent=outcome.wire_bytes[0],
        seconds=round(time.perf_counter() - started, 1),
        commit=commit,
    )


def run_all(out: Path, tasks: Sequence[Task], commit: str, workers: int) -> Iterator[Result]:
    """Train all tasks, ``workers`` at a time; store and yield each result as it is there.

    Raises:
        ConfigError: A run failed. Results of the others that had finished are stored.
    """
    out.mkdir(parents=True, exist_ok=True)
    os.environ.update(WORKER_ENVIRONMENT)  # read when torch is loaded, by the workers
    context = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(workers, mp_context=context)
    try:
        futures = {pool.submit(train, task, commit): task for task in tasks}
        for future in as_completed(futures):
            try:
                result = future.result()
            except (Exception, BrokenProcessPool) as error:
                raise ConfigError(
                    f"{futures[future]}: the run failed: {error!r}. Settings: "
                    f"{' '.join(settings_of(futures[future].keys, futures[future].seed))}"
                ) from error
            _store(result, path_of(out, result.variant, result.seed))
            yield result
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()  # or the end would wait for runs whose results nobody wants
        raise
    finally:
        pool.shutdown()


def _store(result: Result, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
