"""The requirements for GPUs agree with what is declared, tested and measured."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pins(name: str) -> dict[str, str]:
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", text, re.MULTILINE))


def declared() -> set[str]:
    """Return the names that ``setup.py`` requires, as the pins write them."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (wanted,) = [
        keyword.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg == "install_requires"
    ]
    return {re.split(r"[<>=]", requirement)[0].lower() for requirement in ast.literal_eval(wanted)}


def test_every_declared_package_is_pinned_for_gpus() -> None:
    assert not declared() - {name.lower() for name in pins("cuda-py312.txt")}


def test_the_versions_are_those_of_the_tests_and_torch_that_of_the_gpu_measurements() -> None:
    found, tested = pins("cuda-py312.txt"), pins("cpu-py312.txt")
    measured = (ROOT / "docs/performance/h100.md").read_text(encoding="utf-8")
    different = {name for name, version in found.items() if tested.get(name) != version}
    assert different == {"torch"}
    for name in ("torch", "megatron-core", "deepspeed"):
        assert f"{name} {found[name]}" in measured


def test_the_image_copies_what_exists_and_installs_the_pins() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    copied = [word for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for word in line.split()]
    assert all((ROOT / path).exists() for path in copied)
    assert "-r requirements/cuda-py312.txt" in text
