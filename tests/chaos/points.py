"""Brings a fault into this rank: `install` waits for its point, and acts there.

Nothing of the program is imported before the program does it: a module's function is replaced as
soon as the module has been imported. Operations on files are seen through Python's audit events, so
no name of the program is needed for them.
"""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from tests.chaos.faults import CLOCK, FILE, JOB_VARIABLE, POINTS, Fault

__all__ = [
    "AWAY",
    "BALLAST",
    "ROOT",
    "install",
    "install_nan",
    "nan_in_gradient",
    "processes_of",
    "saved_in",
]

ROOT = Path(__file__).resolve().parents[2]
BALLAST = ".ballast"  # the file that fills a disk
AWAY = ".away"  # suffix of a directory that has vanished
SLOW_SECONDS = 0.05  # chosen: a loaded network file system
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def saved_in(job: Path) -> Path:
    """Return checkpoint.dir of the trial that a start belongs to."""
    return job.parent / "saved"


def processes_of(job: Path) -> list[psutil.Process]:
    """Return the living processes of a start; orphans keep the variable that marks them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            is_ours = process.environ().get(JOB_VARIABLE) == str(job)
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def install(fault: Fault) -> None:
    """Act once, ``fault.seconds`` after the ``fault.number``-th time that its point is reached."""
    job = Path(os.environ[JOB_VARIABLE])

    def act() -> None:
        (job / "fired").touch()  # the driver reads this file, not what the program prints
        _ACTS[fault.act](fault, job)

    def reached() -> None:
        if fault.seconds:
            _later(fault.seconds, act)
        else:
            act()

    if fault.point == CLOCK:
        reached()
    elif fault.point == FILE:
        _at_file(saved_in(job), fault.number, reached)
    else:
        module, owner, name = POINTS[fault.point]
        sys.meta_path.insert(0, _AfterImport(module, _patch(owner, name, fault.number, reached)))


def _later(seconds: float, act: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, act)
    timer.daemon = True
    timer.start()


# ---- reaching a point ----


class _AfterImport(MetaPathFinder, Loader):
    """Calls ``then`` with a module right after its import."""

    def __init__(self, module: str, then: Callable[[ModuleType], None]) -> None:
        self._module, self._then = module, then
        self._loader: Any = None

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        # The finders behind this one, which may be others of this class.
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]
        specs = (finder.find_spec(name, path, target) for finder in behind)
        spec = next(spec for spec in specs if spec is not None)
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        self._then(module)


def _patch(
    owner: str, name: str, number: int, reached: Callable[[], None]
) -> Callable[[ModuleType], None]:
    def patch(module: ModuleType) -> None:
        holder = getattr(module, owner) if owner else module
        original = getattr(holder, name)
        seen = 0

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                reached()
            return original(*args, **kwargs)

        setattr(holder, name, call)

    return patch


def _at_file(directory: Path, number: int, reached: Callable[[], None]) -> None:
    """Call ``reached`` before the ``number``-th change of a file in ``directory``."""
    seen = 0

    def change() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            reached()

    _on_changes(directory, change)


def _on_changes(directory: Path, call: Callable[[], None]) -> None:
    """Call ``call`` before each creation, opening for writing, renaming and deletion of a file."""
    inside = str(directory)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & _WRITING:
                return
        elif event in _CHANGES:
            path = arguments[0]
        else:
            return
        if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(inside):
            call()

    sys.addaudithook(hook)  # for ever: Python has no way to remove one


# ---- acts ----


def _kill(process: psutil.Process | None, signum: int = signal.SIGKILL) -> None:
    if process is not None:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signum)


def _launcher(fault: Fault, job: Path) -> psutil.Process | None:
    return psutil.Process().parent()


def _command(fault: Fault, job: Path) -> psutil.Process | None:
    launcher = psutil.Process().parent()
    return None if launcher is None else launcher.parent()


def _myself(fault: Fault, job: Path) -> psutil.Process:
    return psutil.Process()


def _send(
    signum: int, target: Callable[[Fault, Path], psutil.Process | None]
) -> Callable[[Fault, Path], None]:
    return lambda fault, job: _kill(target(fault, job), signum)


def _kill_everything(fault: Fault, job: Path) -> None:
    for process in processes_of(job):
        if process.pid != os.getpid():
            _kill(process)
    os.kill(os.getpid(), signal.SIGKILL)


def _to_all_ranks(fault: Fault, job: Path) -> None:
    launcher = psutil.Process().parent()
    for process in launcher.children() if launcher is not None else []:
        _kill(process, signal.SIGUSR1)


def _pause(fault: Fault, job: Path) -> None:
    clean = {k: v for k, v in os.environ.items() if k != JOB_VARIABLE}
    wake = f"sleep {fault.length}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", wake], env=clean, start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)


def _fill(fault: Fault, job: Path) -> None:
    """Fill the disk of checkpoint.dir, which is a small one of its own, to the last byte."""
    ballast = os.open(saved_in(job) / BALLAST, os.O_WRONLY | os.O_CREAT)
    for block in (1 << 20, 1 << 12):
        with suppress(OSError):
            while os.write(ballast, bytes(block)) == block:
                pass
    os.close(ballast)


def _read_only(fault: Fault, job: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(saved_in(job))], check=False)


def _vanish(fault: Fault, job: Path) -> None:
    saved = saved_in(job)
    with suppress(OSError):
        saved.rename(saved.with_name(saved.name + AWAY))


def _slow(fault: Fault, job: Path) -> None:
    _on_changes(saved_in(job), lambda: time.sleep(SLOW_SECONDS))


def _input_output_error(fault: Fault, job: Path) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


_ACTS: dict[str, Callable[[Fault, Path], None]] = {
    "kill rank": _send(signal.SIGKILL, _myself),
    "kill everything": _kill_everything,
    "kill launcher": _send(signal.SIGKILL, _launcher),
    "kill command": _send(signal.SIGKILL, _command),
    "TERM rank": _send(signal.SIGTERM, _myself),
    "TERM launcher": _send(signal.SIGTERM, _launcher),
    "TERM command": _send(signal.SIGTERM, _command),
    "INT command": _send(signal.SIGINT, _command),
    "USR1 ranks": _to_all_ranks,
    "pause": _pause,
    "freeze": _send(signal.SIGSTOP, _myself),
    "delay": lambda fault, job: time.sleep(fault.length),
    "full disk": _fill,
    "read-only disk": _read_only,
    "slow disk": _slow,
    "lost directory": _vanish,
    "I/O error": _input_output_error,
    "Ctrl-C": lambda fault, job: None,  # the driver sees that the point was reached
}


# ---- gradients ----


def install_nan(rank: int, step: int) -> None:
    """Fill this rank's gradients with NaN in one inner step, if it is ``rank``.

    The step is that of the run, so each start that makes it has the same NaN.
    """
    if int(os.environ["RANK"]) == rank:
        module, _, _ = POINTS["step"]
        sys.meta_path.insert(0, _AfterImport(module, lambda found: _put_nan(found, step)))


@contextmanager
def nan_in_gradient(rank: int, step: int) -> Iterator[None]:
    """Do the same in a rank function while the block runs."""
    from megatron_muloco.training import replica_optimizer as module

    original = module.ReplicaOptimizer.inner_step
    if int(os.environ["RANK"]) == rank:
        _put_nan(module, step)
    try:
        yield
    finally:
        module.ReplicaOptimizer.inner_step = original  # type: ignore[method-assign]


def _put_nan(module: ModuleType, step: int) -> None:
    original = module.ReplicaOptimizer.inner_step

    def inner_step(self: Any) -> Any:
        if self.steps + 1 == step:
            for buffer in self._distributed.buffers:
                buffer.grad_data.fill_(float("nan"))
        return original(self)

    module.ReplicaOptimizer.inner_step = inner_step
