"""Worker process of one rank of `tests.support.spawn.run_ranks`.

A worker is started once and serves many calls, because importing torch and DeepSpeed takes seconds.
After each call the process group, DeepSpeed's copy of it, Megatron's module-level state, the
environment and the signal handlers are therefore restored.

Nothing heavy is imported at the top: the environment has to be set before torch loads.
"""

import faulthandler
import gc
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# One thread per rank: two ranks a core is already the usual load of this suite. No accelerator:
# these ranks test the CPU path, also on a machine with an accelerator.
WORKER_ENV = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

# Rank functions may install handlers for USR1 and TERM, which the product uses.
STACK_DUMP_SIGNAL = signal.SIGUSR2

_TOUCHED_SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Call:
    """One rank's share of a `run_ranks` call; ``target`` is the pickled ``(fn, args)``."""

    rank: int
    world_size: int
    store_port: int
    store_prefix: str
    timeout_s: float
    target: bytes


@dataclass(frozen=True)
class Report:
    """Outcome of a rank's call; ``failed_at`` orders failures over processes (system clock)."""

    value: bytes = b""
    failure: str | None = None
    failed_at: float = 0.0


def serve(connection: Connection, stack_file: Path) -> None:
    """Run calls until ``connection`` closes; after each, send a `Report`, then ``ready``."""
    os.environ.update(WORKER_ENV)
    stacks = stack_file.open("w")
    faulthandler.enable(stacks)
    faulthandler.register(STACK_DUMP_SIGNAL, file=stacks, all_threads=True)
    _load_once()
    connection.send_bytes(b"ready")
    while True:
        try:
            call = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        with ExitStack() as undo:
            connection.send_bytes(pickle.dumps(_run(call, undo)))
        connection.send_bytes(b"ready")


def _load_once() -> None:
    import deepspeed
    import deepspeed.ops
    import torch
    from deepspeed.utils import logger

    # Otherwise the first init_distributed compiles a C++ op that only inference_all_reduce uses.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger.setLevel("WARNING")
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # so that collecting after each call does not walk the imported modules again


def _run(call: Call, undo: ExitStack) -> Report:
    try:
        fn, args = pickle.loads(call.target)
        _enter(call, undo)
        return Report(value=pickle.dumps(fn(*args)))
    except BaseException as error:  # also SystemExit: a rank that exits has failed its test
        return Report(failure=_describe(error), failed_at=time.monotonic())


def _describe(error: BaseException) -> str:
    """Return the traceback without the frames of this file."""
    frame = error.__traceback__
    while frame is not None and frame.tb_frame.f_code.co_filename == __file__:
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame or error.__traceback__))


def _enter(call: Call, undo: ExitStack) -> None:
    """Initialise this process as a rank; push the reversal of every change on ``undo``."""
    import deepspeed
    import torch
    import torch.distributed as dist

    undo.callback(gc.collect)
    _keep_environment(undo)
    for number in _TOUCHED_SIGNALS:
        undo.callback(signal.signal, number, signal.getsignal(number))
    os.environ.update(
        RANK=str(call.rank),
        LOCAL_RANK=str(call.rank),
        WORLD_SIZE=str(call.world_size),
        LOCAL_WORLD_SIZE=str(call.world_size),
        LOCAL_SIZE=str(call.world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(call.store_port),
    )
    undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    torch.manual_seed(0)  # generator state must not leak from one test into the next
    # A little less than the caller's time limit, so that the rank that waits for a lost peer
    # reports it, with the line of its code, before the caller gives up.
    timeout = timedelta(seconds=max(1.0, call.timeout_s * 0.9))
    store = dist.TCPStore("127.0.0.1", call.store_port, is_master=False, timeout=timeout)
    undo.callback(_leave)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(call.store_prefix, store),
        rank=call.rank,
        world_size=call.world_size,
        timeout=timeout,
    )
    deepspeed.init_distributed(dist_backend="gloo", timeout=timeout, verbose=False)


def _keep_environment(undo: ExitStack) -> None:
    before = dict(os.environ)

    def restore() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update(before)

    undo.callback(restore)


def _leave() -> None:
    """Destroy every group: Megatron's first, since its teardown asks torch about them."""
    import torch.distributed as dist

    for module_name, function_name in (
        ("megatron.core.parallel_state", "destroy_model_parallel"),
        ("megatron.core.num_microbatches_calculator", "destroy_num_microbatches_calculator"),
        ("megatron.core.rerun_state_machine", "destroy_rerun_state_machine"),
    ):
        if module := sys.modules.get(module_name):
            teardown: Callable[[], Any] = getattr(module, function_name)
            teardown()
    if dist.is_initialized():
        dist.destroy_process_group()
    # deepspeed.comm keeps the destroyed group as its current backend and would use it again.
    deepspeed_comm: Any = sys.modules["deepspeed.comm.comm"]
    deepspeed_comm.cdb = None
