"""Code in the guides is code that tests run."""

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_megatron_loop_in_the_guide_is_the_one_that_is_tested() -> None:
    guide = (ROOT / "docs/guides/megatron_loop.md").read_text(encoding="utf-8")
    code = (ROOT / "tests/support/bare_loop.py").read_text(encoding="utf-8")
    assert f"```python\n{code}```\n" in guide, (
        "docs/guides/megatron_loop.md shows another loop than tests/support/bare_loop.py; copy the "
        "file into its last block"
    )
