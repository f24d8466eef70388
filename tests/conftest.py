"""Session set-up shared by all tests."""

import os
from collections.abc import Iterator

# Before anything imports torch or DeepSpeed: the suite tests the CPU path, one thread per process.
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# DeepSpeed's Muon, used as an oracle, compiles itself otherwise (half a minute on a CPU).
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import pytest
from hypothesis import HealthCheck, settings

from tests.support import spawn

# Examples are the same in every run, and a loaded machine is not a failure.
settings.register_profile(
    "muloco",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("muloco")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that rewrites recorded numbers."""
    parser.addoption(
        "--update-golden", action="store_true", help="write tests/golden/ instead of comparing"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator where there is none, with the reason in the closing lines."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; none is visible"))


@pytest.fixture(scope="session", autouse=True)
def _rank_workers_end_with_the_session() -> Iterator[None]:
    yield
    spawn.shutdown()
