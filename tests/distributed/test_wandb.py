"""Points in Weights & Biases: what a package that records its calls is given."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

from megatron_muloco.config import load_config
from megatron_muloco.config.rules import check
from megatron_muloco.config.schema import WandbConfig
from megatron_muloco.errors import ConfigError
from megatron_muloco.monitor.writers import Mirrored, WandbWriter, wandb_is_installed
from tests.support.spawn import run_ranks

CONFIG = "configs/cpu_k2.yaml"


class Recorded(ModuleType):
    """The functions of wandb that are used; those of ``fails`` raise."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.calls, self.fails = [], fails
        self.config = SimpleNamespace(update=self._recording("config.update"))
        self.run = SimpleNamespace(
            summary=SimpleNamespace(update=self._recording("summary.update"))
        )
        for name in ("init", "define_metric", "log", "finish"):
            setattr(self, name, self._recording(name))

    def _recording(self, name):
        def call(*args, **kwargs):
            if name in self.fails:
                raise OSError("no route to host")
            self.calls.append((name, args, kwargs))

        return call


def written(fails):
    """Write two points and a text in this worker; return the calls, the reports, the losses."""
    package = sys.modules["wandb"] = Recorded(fails)
    reports = []
    try:
        writer = WandbWriter(
            WandbConfig(project="islands", group="k2"),
            {"inner": {"lr": 0.5}},
            report=reports.append,
        )
        both = Mirrored(writer, writer)
        writer.scalars(20, {"lm loss validation": 2.0})
        writer.scalars(10, {"lm loss": 3.0, "grad-norm": 1.0})
        writer.text("run/plan", "one rank")
        both.close()
    finally:
        del sys.modules["wandb"]
    return package.calls, reports, both.lost_points


def test_an_earlier_step_is_written_after_a_later_one():
    ((calls, reports, lost),) = run_ranks(written, 1, ())
    assert calls[0] == ("init", (), {"project": "islands", "group": "k2", "entity": None})
    assert ("config.update", ({"inner": {"lr": 0.5}},), {"allow_val_change": True}) in calls
    assert ("define_metric", ("*",), {"step_metric": "iteration"}) in calls
    # No step: wandb would drop the second point, whose step is lower.
    assert [(args[0], kwargs["step"]) for name, args, kwargs in calls if name == "log"] == [
        ({"iteration": 20, "lm loss validation": 2.0}, None),
        ({"iteration": 10, "lm loss": 3.0, "grad-norm": 1.0}, None),
    ]
    assert ("summary.update", ({"run/plan": "one rank"},), {}) in calls
    assert (reports, lost, calls[-1][0]) == ([], 0, "finish")


def test_a_failing_service_is_reported_once_and_costs_only_its_points():
    ((calls, reports, lost),) = run_ranks(written, 1, ("log",))
    assert not [name for name, *_ in calls if name == "log"]
    assert lost == 2 * 3  # both writers of the test are the same one
    (report,) = reports
    assert "Weights & Biases failed: no route to host. Training goes on" in report


def test_a_missing_package_is_refused_at_start(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(CONFIG, ["monitor.wandb.project=islands"])
    with pytest.raises(ConfigError, match=r"islands, but the package wandb is not installed\."):
        check(config, rules=(wandb_is_installed,))
    check(load_config(CONFIG), rules=(wandb_is_installed,))
