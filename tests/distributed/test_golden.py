"""Relation 5 between Megatron versions: a tiny run has the recorded losses on each of them.

The numbers of tests/golden/losses.json are rewritten by ``pytest --update-golden``, after looking.
"""

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.support.spawn import run_ranks
from tests.support.tiny_models import ADAMW, MUON, finish_tiny, start_tiny, tiny_config

FILE = Path(__file__).parents[1] / "golden" / "losses.json"
INNER = {"muon": MUON, "adamw": ADAMW}
STEPS = 4  # two rounds of one replica
# Initial weights come from generators seeded by parameter names, so they are the same everywhere.
# Another Megatron version or processor may sum the at most 60 * 16 * 8 terms of a reduction in
# another order: each rounding is at most 2^-24 relative and grows like the square root of the
# number of terms, 88; four steps amplify a difference of parameters by less than 2 a step.
RELATIVE = 16 * 88 * 2.0**-24


def _run(inner: str) -> dict[str, list[float]]:
    run = start_tiny(tiny_config(inner=INNER[inner])).train(STEPS)
    finish_tiny()
    return {"losses": run.losses, "grad_norms": run.grad_norms}


@pytest.mark.parametrize("inner", INNER)
def test_a_tiny_run_has_the_recorded_losses(inner: str, request: pytest.FixtureRequest) -> None:
    (found,) = run_ranks(_run, 1, inner)
    if request.config.getoption("--update-golden"):
        _record(inner, found)
        pytest.skip(f"recorded {inner} in {FILE}")
    recorded = json.loads(FILE.read_text(encoding="utf-8"))[inner]
    for name, values in found.items():
        assert values == pytest.approx(recorded[name], rel=RELATIVE), name


def _record(inner: str, found: dict[str, list[float]]) -> None:
    """Replace the numbers of one inner optimizer; the others stay."""
    numbers = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    numbers[inner] = found
    numbers["recorded_with"] = {name: version(name) for name in ("megatron-core", "torch")}
    FILE.write_text(json.dumps(numbers, indent=1, sort_keys=True) + "\n", encoding="utf-8")
