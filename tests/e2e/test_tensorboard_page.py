"""What a reader sees: TensorBoard's pages of two runs, in a headless browser."""

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import derive, smallest_topology
from megatron_muloco.monitor.build import hyperparameters
from megatron_muloco.monitor.metrics import METRICS
from megatron_muloco.monitor.writers import EventWriter, layout_of
from tests.support.browser import CHROMIUM, Browser, eventually

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine"),
]

# High enough for all charts: TensorBoard draws those that are in view.
TALL = (1280, 14_000)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve two runs with a point of every metric of the registry; return the address."""
    logs = tmp_path_factory.mktemp("logs")
    for name, held_out in (("first", 4.25), ("second", 3.75)):
        config = load_config("configs/cpu_k2.yaml")
        writer = EventWriter(
            str(logs / name),
            resumed_step=0,
            report=pytest.fail,
            settings=hyperparameters(config, derive(config, smallest_topology(config))),
            results=["lm loss validation"],
        )
        for step in (1, 2):
            points = {row.tag: 1.0 / step for row in METRICS}
            writer.scalars(step, points | {"lm loss validation": held_out})
        writer.close()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--port", "0"]
    server = subprocess.Popen(
        [*command, "--load_fast=false"],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    assert server.stderr is not None
    try:
        found = (re.search(r"http://localhost:(\d+)/", line) for line in server.stderr)
        port = next(each[1] for each in found if each)
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile"), size=TALL) as browser:
        yield browser


def test_every_metric_is_drawn_and_the_loss_comes_first(address: str, browser: Browser) -> None:
    browser.open(f"{address}#custom_scalars")

    def drawn() -> set[str]:  # the tags of the curves, below their charts
        return set(re.findall(r"^(.+) \(first\)$", browser.text(), re.MULTILINE))

    assert eventually(lambda: drawn() >= {row.tag for row in METRICS}), (
        f"not drawn: {[row.tag for row in METRICS if row.tag not in drawn()]}"
    )
    lines = browser.text().splitlines()
    titles = [title for charts in layout_of(METRICS).values() for title in charts]
    assert [line for line in lines if line in titles] == titles
    assert titles[0] == "training loss (nats per token)"


def test_every_run_is_a_row_of_hyperparameters(address: str, browser: Browser) -> None:
    browser.open(f"{address}#hparams")
    # The names are there before the row's values.
    shown = {"first", "second", "4.2500", "3.7500", "MuLoCo"}
    assert eventually(lambda: shown <= set(browser.text().splitlines())), browser.text()
    lines = browser.text().splitlines()
    assert [lines.count(name) for name in ("first", "second")] == [1, 1]
    assert {"H", "Inner lr", "K", "Method", "Wire", "lm loss validation"} <= set(lines)
