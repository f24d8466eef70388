"""The package's own names are there, and cost nothing until they are used."""

import subprocess
import sys

import pytest

import megatron_muloco


@pytest.mark.parametrize("name", megatron_muloco.__all__)
def test_public_names_can_be_imported(name: str) -> None:
    assert callable(getattr(megatron_muloco, name))


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, megatron_muloco; megatron_muloco.load_config; "
        "sys.exit(' '.join({'torch', 'megatron', 'deepspeed'} & sys.modules.keys()) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'wrap_optimiser'"):
        _ = megatron_muloco.wrap_optimiser
