"""Exports of real checkpoints: weights come back bit for bit, and other programs compute alike.

Tests that need the transformers library are skipped where it is not installed.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_muloco.checkpoint.state import RunState
from megatron_muloco.checkpoint.store import CheckpointStore
from tests.support.spawn import run_ranks
from tests.support.tensors import assert_equal
from tests.support.tiny_models import TinyRun, finish_tiny, start_tiny, tiny_config
from tools.export import export
from tools.exporting.hugging_face import FAMILIES, ImportedModel
from tools.exporting.live import live_model
from tools.exporting.source import TrainedModel
from tools.exporting.torch_dist import one_rank
from tools.import_weights import import_weights

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)

# 576 rows of embedding for 512 tokens: the padding has to survive.
VOCABULARY = {"vocab_size": 512, "make_vocab_size_divisible_by": 96}
TIED = {"untie_embeddings_and_output_weights": False, "init": "megatron"}
PLAIN = {"post_layernorm": False}
BARE = {"post_layernorm": False, "qk_layernorm": False}
ALL_HEADS = {"num_query_groups": 4}

# Each family with what it can express; two key/value heads for four query heads unless said.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm3": ("lfm3", {}),
    "lfm3-tied": ("lfm3", TIED),
    "lfm3-without-post-norms": ("lfm3", PLAIN | ALL_HEADS),
    "gemma3": ("gemma3", {}),
    "gemma3-tied": ("gemma3", TIED),
    "gemma3-all-heads": ("gemma3", ALL_HEADS),
    "qwen3": ("qwen3", PLAIN),
    "qwen3-tied": ("qwen3", PLAIN | TIED),
    "llama": ("llama", BARE),
    "llama-tied": ("llama", BARE | TIED | ALL_HEADS),
}
PROMPT = [72, 101, 108, 108, 111]


def randomise(stage: Any) -> Any:
    """Give norms other weights than ones, so that no two of them can be confused."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.3 * torch.randn(parameter.shape, generator=generator))
    return stage


def save(directory: Path, steps: int, **sections: Any) -> None:
    """Train a tiny model and save it, after training with its final anchor."""
    model = {**VOCABULARY, **sections.pop("model", {})}
    run: TinyRun = start_tiny(tiny_config(model=model, **sections), change=randomise)
    try:
        run.train(steps)
        optimizer = run.optimizer
        state = RunState(
            run.groups, optimizer.view, optimizer.inner, optimizer.synchronizer, run.config
        )
        state.scalars.update(step=steps, consumed_samples=steps * 8)
        store = CheckpointStore(directory, run.groups)
        path = store.save(steps, state)
        if steps:
            optimizer.flush()
            store.save_final_anchor(path, state)
    finally:
        finish_tiny()


def export_and_read(
    directory: Path, case: str
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the weights of a checkpoint, and those of its export."""
    family, model = CASES[case]
    save(directory / "run", 0, model=model)
    source = TrainedModel.open(directory / "run")
    export(directory / "run", directory / "export", form="hf", target=family)
    back = ImportedModel(directory / "export")
    assert back.model == source.model
    before = {name: source.tensor(name) for name in source.shapes}
    return before, {name: back.tensor(name) for name in back.shapes}


def ulps(values: torch.Tensor) -> torch.Tensor:
    """The distance from each value to the next larger one."""
    return torch.nextafter(values.abs(), torch.tensor(float("inf"))) - values.abs()


@pytest.mark.parametrize("case", CASES)
def test_weights_come_back(case: str, tmp_path: Path) -> None:
    [(before, after)] = run_ranks(export_and_read, 1, tmp_path, case)
    assert before.keys() == after.keys()
    for name, values in before.items():
        if CASES[case][0] != "gemma3" or not ("norm" in name or "embedding" in name):
            assert_equal(after[name], values)
            continue
        # Two roundings to the nearest, of the stored value and of the value that is computed from
        # it: at most one ulp of the larger of the two, where the stored one is seen in our units.
        scale = 32**0.5 if "final" in name and "tied" in case else 1.0
        stored = (values * scale - 1) / scale if "norm" in name else values
        bound = torch.maximum(ulps(values), ulps(stored))
        assert bool(((after[name] - values).abs() <= bound).all()), name


def digests(directory: Path) -> list[str]:
    """Return the digest that the run saved, and those after an export and an import."""
    source = TrainedModel.open(directory / "run")
    export(directory / "run", directory / "export", form="hf", target="lfm3")
    digest = import_weights(directory / "export", directory / "back")
    again = TrainedModel.open(directory / "back")
    with one_rank():
        for name in again.shapes:
            again.tensor(name)
    return [source.description.anchor_digest, digest, again.verify()]


def test_any_layout_is_read_in_one_process(tmp_path: Path) -> None:
    parallel = {"num_replicas": 2, "tensor_model_parallel_size": 2}
    run_ranks(save_layout, 4, tmp_path / "run", parallel)
    [found] = run_ranks(digests, 1, tmp_path)
    assert len(set(found)) == 1
    card = (tmp_path / "export" / "README.md").read_text()
    assert "K = 2 replicas" in card
    assert f"{3 * 8 * 16:,}" in card  # steps, batch, tokens of a sequence


def save_layout(directory: Path, parallel: dict[str, int]) -> None:
    """Save three steps, the last of them in the middle of a round."""
    save(directory, 3, parallel=parallel, training={"train_iters": 3})


# ---- other programs ----------------------------------------------------------------------------


def compare_with_transformers(directory: Path, case: str) -> tuple[float, list[int], list[int]]:
    """Return the largest difference of a logit, and both greedy continuations."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    family, model = CASES[case]
    save(directory / "run", 0, model=model)
    export(directory / "run", directory / "export", form="hf", target=family)
    config = json.loads((directory / "export" / "config.json").read_text())
    loader = getattr(transformers, config["architectures"][0])
    theirs, loading = loader.from_pretrained(directory / "export", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    theirs.eval()
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with live_model(directory / "run") as live, torch.no_grad():
        difference = (live.logits(tokens) - theirs(tokens).logits).abs().max()
        ours = live.continuation(PROMPT, length=10, temperature=0, top_p=1, seed=0)
    settings = {"max_new_tokens": 10, "do_sample": False}
    generated = theirs.generate(torch.tensor([PROMPT]), **settings)[0, len(PROMPT) :]
    return float(difference), ours, generated.tolist()


@needs_transformers
@pytest.mark.parametrize("case", CASES)
def test_transformers_computes_the_same(case: str, tmp_path: Path) -> None:
    [(difference, ours, theirs)] = run_ranks(
        compare_with_transformers, 1, tmp_path, case, timeout_s=300
    )
    assert difference <= 1e-5
    assert ours == theirs


def test_every_family_has_a_case() -> None:
    assert {family for family, _ in CASES.values()} == {family.key for family in FAMILIES}


# ---- Megatron ----------------------------------------------------------------------------------


def load_into_megatron(directory: Path, model: dict[str, Any]) -> tuple[float, bool]:
    """Load a release strictly into Megatron's own local specification; compare logits and weights.

    Returns the largest difference of a logit, and whether all weights have equal bits.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from megatron_muloco.model.build import transformer_config

    save(directory / "run", 0, model=model)
    export(directory / "run", directory / "release", form="megatron")
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with live_model(directory / "run") as live:
        config, source = live.config, live.source
        theirs = GPTModel(
            config=transformer_config(config),
            transformer_layer_spec=get_gpt_layer_local_spec(
                qk_layernorm=config.model.qk_layernorm, normalization="RMSNorm"
            ),
            vocab_size=576,
            max_sequence_length=16,
            parallel_output=True,
            share_embeddings_and_output_weights=(
                not config.model.untie_embeddings_and_output_weights
            ),
            position_embedding_type="rope",
            rotary_base=config.model.rotary_base,
            pg_collection=live.groups.pg,
        )
        wanted = theirs.sharded_state_dict(metadata={"dp_cp_group": live.groups.pg.dp_cp})
        loaded, missing, unexpected = dist_checkpointing.load(
            {"model": wanted},
            str(directory / "release" / "release"),
            strict=StrictHandling.RETURN_ALL,
        )
        assert not [key for key in missing | unexpected if not key.endswith("_extra_state")]
        theirs.load_state_dict(loaded["model"], strict=True)
        theirs.eval()
        positions = torch.arange(16).unsqueeze(0)
        mask = torch.ones(1, 1, 16, 16).triu(1).bool()
        with torch.no_grad():
            logits = theirs(tokens, positions, mask)
            difference = float((live.logits(tokens) - logits).abs().max())
        same = all(
            torch.equal(parameter, source.tensor(name))
            for name, parameter in theirs.named_parameters()
        )
    return difference, same


@pytest.mark.parametrize("model", [PLAIN, BARE | TIED], ids=["qk-norms", "bare-tied"])
def test_megatrons_own_specification_loads_the_release(
    model: dict[str, Any], tmp_path: Path
) -> None:
    [(difference, same)] = run_ranks(load_into_megatron, 1, tmp_path, model, timeout_s=300)
    assert same
    # Its attention multiplies whole matrices where ours calls torch's kernel: another order of
    # the same sums.
    assert difference <= 1e-5
