"""The code of pseudogradients in words, for the plan."""

from megatron_muloco.config.compression import (
    CodeConfig,
    CompressionConfig,
    E3M0Compression,
    LinearCompression,
    NoCompression,
    StatisticalCompression,
    TopKCompression,
)

__all__ = ["code_name", "code_words", "exception_words", "feedback_words"]


def code_name(code: CompressionConfig) -> str:
    """Return what travels, in short: ``bf16`` or ``linear, 4 bits``."""
    if isinstance(code, NoCompression):
        return code.wire_dtype
    if isinstance(code, TopKCompression):
        return f"top-k, {100 * code.density:g} %"
    return f"{code.kind}, {_bits(code.bits)}"


def code_words(code: CodeConfig) -> str:
    """Return what shares a scale, or how the largest values are sent."""
    if isinstance(code, TopKCompression):
        values = f"{_bits(code.value_bits)} each" if code.value_bits else code.wire_dtype
        return f"the largest of every {code.block_size} values, {values}, and their places"
    what = {"linear": "smallest and largest value", "e3m0": "scale"}.get(code.kind, "table")
    return f"a {what} per {_group(code)}"


def exception_words(code: CodeConfig) -> str:
    """Return what is coded otherwise; nothing where nothing is."""
    names = {"norm": "norms", "embedding": "embedding", "output": "output head"}
    bits = {what: getattr(code.exceptions, key) for key, what in names.items()}
    return ", ".join(
        f"{what} {'fp32' if value == 'none' else _bits(value)}"
        for what, value in bits.items()
        if value is not None
    )


def feedback_words(code: CodeConfig) -> tuple[str, str]:
    """Return the decay of error feedback, and what it keeps."""
    if not code.error_feedback:
        return "none", "what a code loses is lost"
    own = "what this replica's code loses"
    if isinstance(code, TopKCompression):
        return f"{code.error_decay:g}", own
    return f"{code.error_decay:g}", f"{own}, and the code of the mean it owns"


def _group(code: LinearCompression | StatisticalCompression | E3M0Compression) -> str:
    if code.granularity == "block":
        return f"block of {code.values_per_block}"
    return {"tensor": "piece of a tensor", "row": "row"}[code.granularity]


def _bits(bits: int) -> str:
    return f"{bits} {'bit' if bits == 1 else 'bits'}"
