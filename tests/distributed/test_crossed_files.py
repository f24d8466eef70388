"""An outer step and a save cross few files, all in the packages that are about them."""

from pathlib import Path

import pytest

from tests.support.crossed import METHODS, Method, trace
from tests.support.spawn import run_ranks

Crossed = list[dict[str, dict[str, set[str]]]]

# Packages whose code an outer step, or a save, must not execute.
FOREIGN = {
    "outer step": ("checkpoint/", "config/", "data/", "model/", "monitor/", "planning/"),
    "save": ("data/", "monitor/", "planning/", "training/"),
}


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.name)
def method(request: pytest.FixtureRequest) -> Method:
    return request.param


@pytest.fixture(scope="module")
def ranks(method: Method, tmp_path_factory: pytest.TempPathFactory) -> Crossed:
    directory: Path = tmp_path_factory.mktemp("checkpoints")
    return run_ranks(trace, 2, method, directory, timeout_s=120.0)


def test_no_foreign_package_is_crossed(ranks: Crossed) -> None:
    for crossed in ranks:
        for event, files in crossed.items():
            assert files, event
            assert not [file for file in files if file.startswith(FOREIGN[event])], event


def test_few_files_are_crossed(method: Method, ranks: Crossed) -> None:
    for crossed in ranks:
        for event, files in crossed.items():
            assert len(files) <= method.limits[event], f"{event}: {sorted(files)}"
