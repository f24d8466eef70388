"""Fused paths of the model against the unfused ones, on the CPU."""

from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers

from megatron_muloco.config import RunConfig
from megatron_muloco.model.build import build_model
from megatron_muloco.model.fused import (
    UNFUSED,
    Fusions,
    RotaryKernel,
    accumulate_product,
    can_accumulate,
    choose_fusions,
    install,
)
from megatron_muloco.runtime.megatron import wrap_data_parallel
from megatron_muloco.training.forward import ForwardBackward
from megatron_muloco.training.start import initialize_replicas
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, made_up_tokens, tiny_config

MICROBATCHES = 3
CUDA = torch.device("cuda")
Result = tuple[float, dict[str, torch.Tensor]]


Case = tuple[dict[str, Any], tuple[Fusions, ...]]


def _compare(cases: dict[str, Case]) -> dict[str, list[Result]]:
    """Return the results of `_gradients` for each case, all from one process."""
    return {name: _gradients(tiny_config(**keys), chosen) for name, (keys, chosen) in cases.items()}


def _gradients(config: RunConfig, choices: tuple[Fusions, ...]) -> list[Result]:
    """Return loss and main gradients of one step for each choice."""
    # What Megatron compiles runs as it is written: the arithmetic is tested, not the compiler.
    torch.compiler.set_stance("force_eager")
    groups = initialize_replicas(config)
    training, results = config.training, []
    for fusions in choices:
        stage: Any = build_model(config, groups, fusions)
        assert stage.config.gradient_accumulation_fusion == fusions.weight_gradients
        assert stage.config.bias_activation_fusion == fusions.swiglu
        assert stage.config.cross_entropy_loss_fusion == fusions.cross_entropy
        assert stage.config.apply_rope_fusion == bool(fusions.rotary)
        model = wrap_data_parallel(
            stage,
            groups,
            reduce_in_fp32=training.accumulate_dtype == "fp32",
            overlap_grad_reduce=training.overlap_grad_reduce,
            overlap_param_gather=False,
            bucket_size=2000,
        )
        forward = ForwardBackward(
            model,
            groups,
            micro_batch_size=1,
            seq_length=config.model.seq_length,
            end_of_document=None,
        )
        model.zero_grad_buffer()
        length, vocabulary = config.model.seq_length, config.model.vocab_size
        rows = (made_up_tokens(i, length + 1, vocabulary)[None] for i in range(MICROBATCHES))
        places = torch.arange(length)[None]
        loss = forward(
            iter(
                {"tokens": row[:, :-1], "labels": row[:, 1:], "position_ids": places}
                for row in rows
            ),
            MICROBATCHES,
        )
        named = model.module.named_parameters()
        results.append((float(loss), {name: p.main_grad.clone() for name, p in named}))
    finish_tiny()
    return results


PRODUCT, TABLES = Fusions(weight_gradients=True), Fusions(rotary="cached")
COMPILED = (Fusions(swiglu=True), Fusions(cross_entropy=True))
BF16 = {"precision": "bf16"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_num_layers": 1}
TIED = {"untie_embeddings_and_output_weights": False}
SAME_BITS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training": BF16},
    "bf16 gradients": {"training": {**BF16, "accumulate_dtype": "bf16"}},
    "buckets": {"training": {**BF16, "overlap_grad_reduce": True}},
    "recompute": {"training": {**BF16, **RECOMPUTE}},
}
ALONE: dict[str, Case] = {
    **{name: (keys, (UNFUSED, PRODUCT, TABLES)) for name, keys in SAME_BITS.items()},
    "compiled fp32": ({}, (UNFUSED, *COMPILED)),
    "compiled bf16": ({"training": BF16}, (UNFUSED, *COMPILED)),
    "tied": ({"model": TIED}, (UNFUSED, PRODUCT)),
}
TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PAIR: dict[str, Case] = {
    "tensor": ({"parallel": TENSOR, "training": BF16}, (UNFUSED, PRODUCT)),
    "tied on two stages": (
        {"parallel": {"pipeline_model_parallel_size": 2}, "model": TIED},
        (UNFUSED, PRODUCT),
    ),
}


@pytest.fixture(scope="module")
def alone() -> dict[str, list[Result]]:
    """Return the results of all cases of one rank."""
    (results,) = run_ranks(_compare, 1, ALONE)
    return dict(results)


def assert_close(got: Result, expected: Result, bound: float, what: str) -> None:
    """Require the same loss, and gradients within ``bound`` of the largest of each parameter."""
    assert got[0] == expected[0], what
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, (what, name)
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=bound * scale)


@pytest.mark.parametrize("case", SAME_BITS)
def test_weight_gradients_and_rotary_tables_have_the_same_bits(
    case: str, alone: dict[str, list[Result]]
) -> None:
    plain, *fused = alone[case]
    assert len(fused) == 2
    for result in fused:
        assert_close(result, plain, 0.0, case)


def test_fused_swiglu_and_cross_entropy_compute_the_same(alone: dict[str, list[Result]]) -> None:
    """The loss has the same bits; gradients differ by the dtype that intermediate values have."""
    # Megatron writes the derivative of SiLU as products, autograd as one kernel: at most eight
    # roundings more in each of two layers, and no sum of gradients is larger than its terms allow.
    # The fused gradient of the logits is rounded to bf16, as autograd rounds the unfused one.
    bounds = {"fp32": (16 * 2.0**-24, 2.0**-7), "bf16": (16 * 2.0**-9, 0.0)}
    for precision, both in bounds.items():
        plain, *fused = alone[f"compiled {precision}"]
        for result, bound in zip(fused, both, strict=True):
            assert_close(result, plain, bound, precision)


def test_a_tied_embedding_keeps_both_its_gradients(alone: dict[str, list[Result]]) -> None:
    """On one stage, the weight's gradient is the sum over the head and the embedding."""
    plain, fused = alone["tied"]
    # Unfused, autograd adds the two parts first and then the microbatches; fused, each part is
    # added alone: a few more fp32 roundings.
    assert_close(fused, plain, 8 * 2.0**-24, "tied")
    others = [name for name in plain[1] if "embedding" not in name]
    assert all(torch.equal(fused[1][name], plain[1][name]) for name in others)


def test_ranks_of_a_replica_get_the_same_weight_gradients() -> None:
    for results in run_ranks(_compare, 2, PAIR):
        for case, (plain, fused) in results.items():
            assert_close(fused, plain, 0.0, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_has_the_bits_of_megatrons(dtype: torch.dtype) -> None:
    kernel = RotaryKernel(compiled=False)
    generator = torch.Generator().manual_seed(3)
    for length in (6, 4, 6):  # a table of other angles replaces the last
        angles = torch.randn(length, 1, 1, 8, generator=generator).mul_(100)
        x = torch.randn(length, 2, 3, 8, generator=generator).to(dtype)
        for same in (angles, angles.detach()):
            expected = rope_utils._apply_rotary_pos_emb_bshd(x, same)
            assert torch.equal(kernel(x, same, interleaved=False), expected)


def test_the_table_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[torch.Tensor] = []
    cosine = torch.cos

    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return cosine(x)

    monkeypatch.setattr(torch, "cos", counted)
    kernel = RotaryKernel(compiled=False)
    angles, x = torch.zeros(4, 1, 1, 8), torch.ones(4, 2, 3, 8)
    for _ in range(3):
        kernel(x, angles.detach(), interleaved=False)  # as recomputation passes it
        kernel(x.bfloat16(), angles, interleaved=False)
    assert len(calls) == 2  # one in each dtype
    kernel(x, angles.clone(), interleaved=False)
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16])
def test_the_product_is_added_in_place(dtype: torch.dtype, main: torch.dtype) -> None:
    inputs = torch.arange(6.0).view(3, 2).to(dtype)
    outputs = torch.arange(12.0).view(3, 4).to(dtype)
    total = torch.ones(4, 2, dtype=main)
    address = total.data_ptr()
    accumulate_product(inputs, outputs, total)
    assert total.data_ptr() == address
    assert torch.equal(total.float(), 1 + outputs.float().t() @ inputs.float())


def test_a_sum_that_loses_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_accumulate(torch.device("cpu"))

    def through_bf16(inputs: torch.Tensor, grads: torch.Tensor, total: torch.Tensor) -> None:
        total.copy_(total.bfloat16() + grads.t() @ inputs)

    def missing(inputs: torch.Tensor, grads: torch.Tensor, total: torch.Tensor) -> None:
        raise TypeError("addmm() got an unexpected keyword argument 'out_dtype'")

    for broken in (through_bf16, missing):
        monkeypatch.setattr("megatron_muloco.model.fused.accumulate_product", broken)
        assert not can_accumulate(torch.device("cpu"))


def test_a_torch_without_the_product_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr("megatron_muloco.model.fused.can_accumulate", lambda device: False)
    monkeypatch.setattr("megatron_muloco.model.fused.can_compile", lambda: False)
    chosen = choose_fusions(tiny_config().training, CUDA)
    assert not chosen.weight_gradients
    assert not chosen.swiglu
    assert chosen.rotary == "cached"
    assert "weight gradients are not: this torch" in chosen.line()
    assert "triton or a C compiler is missing" in chosen.line()


def test_what_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_muloco.model.fused.can_accumulate", lambda device: True)
    monkeypatch.setattr("megatron_muloco.model.fused.can_compile", lambda: True)
    bf16 = tiny_config(training={"precision": "bf16"}).training
    assert choose_fusions(bf16, CUDA).line() == (
        "fused: weight gradients, SwiGLU, cross entropy, RoPE (compiled)"
    )
    fp32 = tiny_config(training={"precision": "fp32"}).training
    assert not choose_fusions(fp32, CUDA).cross_entropy  # its gradient would be bf16
    same = tiny_config(training={"precision": "bf16", "deterministic": True}).training
    assert not choose_fusions(same, CUDA).cross_entropy  # its sums are compiled
    none = tiny_config(training={"precision": "bf16", "fusions": "none"}).training
    assert choose_fusions(none, CUDA) == UNFUSED


def test_the_rotary_kernel_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_muloco.model.fused.can_accumulate", lambda device: True)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    training = tiny_config().training
    for kernel, name in ((len, "Transformer Engine"), (RotaryKernel(compiled=False), "cached")):
        monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", kernel)
        monkeypatch.setattr("megatron_muloco.model.fused.can_compile", lambda: False)
        chosen = choose_fusions(training, CUDA)
        assert f"RoPE ({name})" in chosen.line()
        install(chosen)
        assert rope_utils.fused_apply_rotary_pos_emb is kernel  # what is there stays


def test_nothing_is_fused_on_a_cpu() -> None:
    assert choose_fusions(tiny_config().training, torch.device("cpu")) == UNFUSED
    assert UNFUSED.line() == "fused: nothing"
