"""Code in the guides is code that tests run."""

import re
import textwrap
from pathlib import Path

from megatron_muloco.config import load_config
from megatron_muloco.config.derived import topology_of
from megatron_muloco.monitor.throughput import gpu_by_name
from megatron_muloco.planning.report import render_plan
from megatron_muloco.planning.verdict import Device

ROOT = Path(__file__).parents[2]


def test_the_megatron_loop_in_the_guide_is_the_one_that_is_tested() -> None:
    guide = (ROOT / "docs/guides/megatron_loop.md").read_text(encoding="utf-8")
    code = (ROOT / "tests/support/bare_loop.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in guide, (
        "docs/guides/megatron_loop.md shows another loop than tests/support/bare_loop.py; copy the "
        "file into its last block"
    )


# The file is the last one named before the block.
SHOWN = re.compile(r"`(tests/[\w/]+\.py)`(?:(?!`tests/|```).)*```python\n(.*?)```\n", re.DOTALL)


def is_excerpt(block: str, code: str) -> bool:
    """Whether a block is a run of whole lines of a file, possibly without their indentation."""
    lines, count = code.splitlines(), len(block.splitlines())
    starts = range(len(lines) - count + 1)
    return any(textwrap.dedent("\n".join(lines[i : i + count])) + "\n" == block for i in starts)


def test_code_about_extensions_is_code_of_the_tests() -> None:
    guide = (ROOT / "docs/guides/extending.md").read_text(encoding="utf-8")
    shown = SHOWN.findall(guide)
    assert len(shown) == guide.count("```python\n") > 0, "a block has no file named before it"
    for name, block in shown:
        code = (ROOT / name).read_text(encoding="utf-8")
        assert is_excerpt(block, code), f"this is no excerpt of {name}; copy it again:\n{block}"


def test_an_excerpt_is_whole_lines_without_changes() -> None:
    code = "def f():\n    a = 1\n\n    return a\n"
    assert is_excerpt("a = 1\n\nreturn a\n", code)
    assert not is_excerpt("a = 1\nreturn a\n", code)
    assert not is_excerpt("a = 2\n", code)


def test_the_plan_in_the_15b_guide_is_what_the_command_prints() -> None:
    guide = (ROOT / "docs/guides/15b.md").read_text(encoding="utf-8")
    excerpt = guide.partition("prints (excerpt):\n\n```\n")[2].partition("```")[0].splitlines()
    config = load_config(ROOT / "configs/15b_k16.yaml")
    gpu = gpu_by_name("NVIDIA H100 80GB HBM3")
    device = Device(gpu.device, gpu.memory_gb * 10**9)
    printed = iter(render_plan(config, topology_of(config, 1024), device).splitlines())
    assert excerpt
    # "in" consumes the iterator, so the lines must also be in the plan's order.
    assert not [line for line in excerpt if line not in printed]
