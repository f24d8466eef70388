"""Fused paths of the model against the unfused ones, on the CPU."""

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import layers

from megatron_muloco.config import RunConfig
from megatron_muloco.model.build import build_model
from megatron_muloco.model.fused import (
    UNFUSED,
    Fusions,
    accumulate_product,
    can_accumulate,
    choose_fusions,
)
from megatron_muloco.runtime.megatron import wrap_data_parallel
from megatron_muloco.training.forward import ForwardBackward
from megatron_muloco.training.start import initialize_replicas
from tests.support.spawn import run_ranks
from tests.support.tiny_models import finish_tiny, made_up_tokens, tiny_config

MICROBATCHES = 3
CUDA = torch.device("cuda")
Result = tuple[float, dict[str, torch.Tensor]]


def _compare(
    configs: dict[str, RunConfig], choices: tuple[Fusions, ...]
) -> dict[str, list[Result]]:
    """Return the results of `_gradients` for each config, all from one process."""
    return {name: _gradients(config, choices) for name, config in configs.items()}


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


CASES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"training": {"precision": "bf16"}},
    "bf16 gradients": {"training": {"precision": "bf16", "accumulate_dtype": "bf16"}},
    "buckets": {"training": {"precision": "bf16", "overlap_grad_reduce": True}},
    "recompute": {
        "training": {
            "precision": "bf16",
            "recompute_granularity": "full",
            "recompute_num_layers": 1,
        }
    },
}
FUSED = Fusions(weight_gradients=True)


def test_fused_weight_gradients_have_the_same_bits() -> None:
    configs = {name: tiny_config(**case) for name, case in CASES.items()}
    (results,) = run_ranks(_compare, 1, configs, (UNFUSED, FUSED))
    for case, (plain, fused) in results.items():
        assert fused[0] == plain[0], case
        assert fused[1].keys() == plain[1].keys()
        for name, gradient in plain[1].items():
            assert gradient.any(), (case, name)
            assert torch.equal(fused[1][name], gradient), (case, name)


def test_tensor_parallel_ranks_get_the_same_weight_gradients() -> None:
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    config = tiny_config(parallel=parallel, training={"precision": "bf16"})
    for plain, fused in run_ranks(_gradients, 2, config, (UNFUSED, FUSED)):
        assert fused[0] == plain[0]
        for name, gradient in plain[1].items():
            assert torch.equal(fused[1][name], gradient), name


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_tied_embedding_keeps_both_its_gradients(pipeline: int) -> None:
    """On one stage, the weight's gradient is the sum over the head and the embedding."""
    config = tiny_config(
        model={"untie_embeddings_and_output_weights": False},
        parallel={"pipeline_model_parallel_size": pipeline},
    )
    for plain, fused in run_ranks(_gradients, pipeline, config, (UNFUSED, FUSED)):
        assert fused[0] == plain[0]
        for name, gradient in plain[1].items():
            # Unfused, autograd adds the two parts first and then the microbatches; fused, each part
            # is added alone: two more fp32 roundings in a sum of a few terms.
            scale = gradient.abs().max()
            bound = 0.0 if "embedding" not in name else float(scale) * 8 * 2.0**-24
            torch.testing.assert_close(fused[1][name], gradient, rtol=0, atol=bound)


def test_fused_swiglu_and_cross_entropy_compute_the_same() -> None:
    """The loss has the same bits; gradients differ by the dtype that intermediate values have."""
    fp32, bf16 = tiny_config(), tiny_config(training={"precision": "bf16"})
    choices = (UNFUSED, Fusions(swiglu=True), Fusions(cross_entropy=True))
    (results,) = run_ranks(_compare, 1, {"fp32": fp32, "bf16": bf16}, choices)
    # Megatron writes the derivative of SiLU as products, autograd as one kernel: at most eight
    # roundings more in each of two layers, and no sum of gradients is larger than its terms allow.
    # The fused gradient of the logits is rounded to bf16, as autograd rounds the unfused one.
    bounds = {"fp32": (16 * 2.0**-24, 2.0**-7), "bf16": (16 * 2.0**-9, 0.0)}
    for case, (plain, *fused) in results.items():
        for (loss, gradients), bound in zip(fused, bounds[case], strict=True):
            assert loss == plain[0], case
            for name, gradient in plain[1].items():
                scale = float(gradient.abs().max())
                torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=bound * scale)


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
    assert "weight gradients are not: this torch" in chosen.line()
    assert "triton or a C compiler is missing" in chosen.line()


def test_what_is_fused_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_muloco.model.fused.can_accumulate", lambda device: True)
    monkeypatch.setattr("megatron_muloco.model.fused.can_compile", lambda: True)
    bf16 = tiny_config(training={"precision": "bf16"}).training
    assert choose_fusions(bf16, CUDA).line() == "fused: weight gradients, SwiGLU, cross entropy"
    fp32 = tiny_config(training={"precision": "fp32"}).training
    assert not choose_fusions(fp32, CUDA).cross_entropy  # its gradient would be bf16
    none = tiny_config(training={"precision": "bf16", "fusions": "none"}).training
    assert choose_fusions(none, CUDA) == UNFUSED


def test_nothing_is_fused_on_a_cpu() -> None:
    assert choose_fusions(tiny_config().training, torch.device("cpu")) == UNFUSED
    assert UNFUSED.line() == "fused: nothing"
