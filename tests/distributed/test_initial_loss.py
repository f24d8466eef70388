"""The loss before training: a model that knows nothing is near ln(vocabulary), tied or not."""

import math

import pytest

from megatron_muloco.config import RunConfig
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, start_tiny, tiny_config

VOCABULARY = 1024
WIDE = {
    "hidden_size": 256,
    "ffn_hidden_size": 704,
    "num_query_groups": 4,
    "kv_channels": 64,
    "seq_length": 64,
    "vocab_size": VOCABULARY,
}


def _first_loss(config: RunConfig) -> float:
    run = start_tiny(config).train(1)
    finish_tiny()
    return run.losses[0]


CASES = [
    (init, tied, post_layernorm)
    for init in ("muloco", "megatron")
    for tied in (True, False)
    for post_layernorm in (True, False)
    if (init, tied, post_layernorm) != ("muloco", True, False)  # a config rule refuses it
]


@pytest.mark.parametrize(("init", "tied", "post_layernorm"), CASES)
def test_the_first_loss_is_near_that_of_a_uniform_guess(
    init: str, tied: bool, post_layernorm: bool
) -> None:
    model = {
        **WIDE,
        "init": init,
        "untie_embeddings_and_output_weights": not tied,
        "post_layernorm": post_layernorm,
    }
    (loss,) = run_ranks(_first_loss, 1, tiny_config(model=model))
    # A head with logits of unit variance costs half a nat; one with wrong scale, tens of nats.
    assert 0.0 < loss - math.log(VOCABULARY) < 1.2
