"""Known warnings of other packages are silenced by their text, and no others."""

import logging
import warnings

import pytest

from megatron_muloco.runtime.distributed import silence_known_warnings


def test_known_warnings_are_dropped_and_others_pass() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        silence_known_warnings()
        warnings.warn("Apex is not installed. Falling back to Torch Norm", stacklevel=1)
        warnings.warn("Apex is not installed. Falling over", stacklevel=1)
        text = "`torch.distributed.reduce_scatter_tensor` is deprecated. Use another."
        warnings.warn(text, FutureWarning, stacklevel=1)
        warnings.warn(text, stacklevel=1)  # the same text in another category
    assert [str(warning.message) for warning in seen] == [
        "Apex is not installed. Falling over",
        text,
    ]


def test_known_log_lines_are_dropped_once_and_for_all(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    kept = list(logger.filters)
    try:
        silence_known_warnings()
        silence_known_warnings()
        assert len(logger.filters) <= len(kept) + 1
        logger.warning("GPTModel IS DEPRECATED. Use %s.", "another")
        logger.warning("GPTModel is on fire")
    finally:
        logger.filters[:] = kept
    assert [record.getMessage() for record in caplog.records] == ["GPTModel is on fire"]
