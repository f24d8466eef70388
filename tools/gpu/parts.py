"""Checks of the parts of an outer step and of the model's fused operations: T2 and T9.

Each compares the device with the CPU, or a fused operation with the plain one. On a CPU the two
sides of T2 are the same device, so only the calls themselves are tried.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_muloco.checkpoint.sharding import digest_sum
from megatron_muloco.config.schema import TrainingConfig
from megatron_muloco.model.fused import (
    RotaryKernel,
    accumulate_product,
    can_compile,
    choose_fusions,
)
from megatron_muloco.outer.diagnostics import PseudogradientSketch, cosines, gram
from megatron_muloco.outer.guard import local_statistics
from megatron_muloco.outer.optimizer import (
    Additive,
    AnchorState,
    MergeRule,
    Mix,
    OuterNesterov,
    pseudogradient,
)
from megatron_muloco.params import ParamInfo, Shard
from megatron_muloco.runtime.megatron import norm_of_all
from tools.gpu.findings import Finding
from tools.gpu.kernels import relative_error

__all__ = ["fusions", "outer_parts"]

# Digits of fp32 and bf16 that a value holds, as the distance between two of them near 1.
ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7}
# A sum of n terms in another order: a rounding each, which grow like the square root of n.
ROUNDS = 3


def outer_parts(device: torch.device) -> list[Finding]:
    """T2: compute everything that an outer step computes, on the device and on the CPU."""
    numel = 3_000_001 if device.type == "cuda" else 30_001
    cpu = torch.device("cpu")
    return [
        _digest(numel, device),
        _sketch(numel, device),
        _statistics(numel, device),
        _compare("pseudogradient", lambda each: _pseudogradient(numel, each), device),
        _compare("OuterNesterov, 3 rounds", lambda each: _nesterov(numel, each, each), device),
        _compare(
            "the same, state in host memory", lambda each: _nesterov(numel, each, cpu), device
        ),
        *(
            _compare(f"merge, {name}", lambda each, rule=rule: _merged(rule, numel, each), device)  # type: ignore[misc]
            for name, rule in {
                "mix 0": Mix(0.0),
                "mix 0.5": Mix(0.5),
                "additive": Additive(),
            }.items()
        ),
    ]


def _values(numel: int, seed: int, device: torch.device) -> Tensor:
    """Return values of many sizes, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(numel, generator=generator).div_(2).exp_()
    return torch.randn(numel, generator=generator).mul_(scales).to(device)


def ulps(values: Tensor, expected: Tensor) -> int:
    """Return the largest distance in units of the last place; fp32.

    Bits of floating-point numbers of one sign are ordered like the numbers.
    """
    one, other = (_ordered(each.detach().cpu().float().contiguous()) for each in (values, expected))
    return int((one - other).abs().max())


def _ordered(values: Tensor) -> Tensor:
    bits = values.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _compare(name: str, make: Callable[[torch.device], Tensor], device: torch.device) -> Finding:
    """Compare an elementwise computation; it may differ by one rounding."""
    worst = ulps(make(device), make(torch.device("cpu")))
    return Finding("T2", name, f"{worst} units in the last place from the CPU's", worst <= 1)


def _pseudogradient(numel: int, device: torch.device) -> Tensor:
    anchor, local = (_values(numel, seed, device) for seed in (1, 2))
    return pseudogradient(anchor, local, out=torch.empty_like(anchor))


def _nesterov(numel: int, device: torch.device, state_device: torch.device) -> Tensor:
    masters = {"a": _values(numel, 1, device)}
    state = AnchorState(masters, state_device)
    optimizer = OuterNesterov(lr=0.7, momentum=0.6)
    anchor = masters["a"]
    for round_index in range(1, ROUNDS + 1):
        mean = _values(numel, 10 + round_index, device)
        anchor = state.step("a", mean, optimizer, round_index)
    return anchor


def _merged(rule: MergeRule, numel: int, device: torch.device) -> Tensor:
    local, anchor, at_launch = (_values(numel, seed, device) for seed in (1, 2, 3))
    rule.merge(local, anchor, at_launch)
    return local


def _digest(numel: int, device: torch.device) -> Finding:
    info = ParamInfo.from_name("decoder.final_layernorm.weight", (numel,), None)
    shard = Shard(info, 0, numel)
    values = _values(numel, 1, device)

    def digest(given: Tensor, place: torch.device) -> int:
        return int(digest_sum([(shard, given)], tensor_rank=0, tensor_size=1, device=place))

    cpu = torch.device("cpu")
    found, expected = digest(values, device), digest(values.cpu(), cpu)
    moved = digest(values.cpu(), device)
    changed = values.clone()
    changed[numel // 2] *= 1 + ULP[torch.float32]
    shows = digest(changed, device) != found
    same = found == expected == moved
    return Finding(
        "T2",
        f"digest of {numel:,} values",
        f"{'equal to' if same else 'DIFFERENT from'} the CPU's, also of values in host memory; "
        f"one changed bit {'shows' if shows else 'DOES NOT SHOW'}",
        same and shows,
    )


def _sketch(numel: int, device: torch.device) -> Finding:
    """Compare sketches, whose rows are summed in an order that a device chooses, and a cosine."""
    width = 4096
    sketch = PseudogradientSketch(width)
    one, other = _values(numel, 1, device), _values(numel, 2, device)
    pair = torch.stack([sketch({"a": one}), sketch({"a": one + other})])
    on_cpu = torch.stack([sketch({"a": one.cpu()}), sketch({"a": one.cpu() + other.cpu()})])
    rows = math.ceil(numel / width)
    bound = ULP[torch.float32] * math.sqrt(rows) * float(on_cpu.abs().max())
    worst = float((pair.cpu() - on_cpu).abs().max())
    repeated = torch.equal(sketch({"a": one}), pair[0])
    cosine = float(cosines(gram(pair))[0, 1])
    return Finding(
        "T2",
        f"sketch of {numel:,} values, width {width}",
        f"differs by {worst:.1e}, {bound:.1e} allowed; twice: "
        f"{'equal' if repeated else 'DIFFERENT'}; cosine {cosine:.3f}",
        worst <= bound and repeated,
    )


def _statistics(numel: int, device: torch.device) -> Finding:
    """Compare what the guard sees: the squared norm, and which tensors are not finite."""
    tensors = [_values(numel, 1, device), _values(64, 2, device), _values(64, 3, device)]
    tensors[2][5] = float("nan")
    found = local_statistics(tensors, device).cpu()
    expected = local_statistics([each.cpu() for each in tensors], torch.device("cpu"))
    difference = float((found[1] - expected[1]).abs() / expected[1])
    # The norm of n squares in another order, and squared again.
    bound = 2 * ULP[torch.float32] * math.sqrt(numel)
    return Finding(
        "T2",
        "statistics of the guard",
        f"{int(found[0])} tensor not finite; squared norm differs by {difference:.1e}, relative",
        int(found[0]) == int(expected[0]) == 1 and difference <= bound,
    )


# ---- fused operations ----------------------------------------------------------------------------


def fusions(device: torch.device) -> list[Finding]:
    """T9: compare the fused operations of the model with the plain ones and with fp64."""
    training = TrainingConfig(micro_batch_size=1, global_batch_size=1, precision="bf16")
    line = choose_fusions(training, device).line()
    findings = [Finding("T9", "what runs fused here", line)]
    tokens, inputs, outputs = (4096, 1024, 2816) if device.type == "cuda" else (256, 64, 176)
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator(device).manual_seed(0)
        source, gradient = (
            torch.randn(tokens, width, generator=generator, device=device).to(torch.bfloat16)
            for width in (inputs, outputs)
        )
        held = torch.randn(outputs, inputs, generator=generator, device=device).to(dtype)
        exact = held.double() + gradient.double().t() @ source.double()
        plain = held.clone().add_(gradient.t().matmul(source))
        fused = held.clone()
        accumulate_product(source, gradient, fused)
        errors = [float((each.double() - exact).norm() / exact.norm()) for each in (fused, plain)]
        # Both products round to bf16 at most once more than the sum.
        bound = ULP[torch.bfloat16]
        findings.append(
            Finding(
                "T9",
                f"weight gradient added to {dtype}",
                f"error {errors[0]:.1e}, of the plain sum {errors[1]:.1e}, {bound:.1e} allowed",
                errors[0] <= bound and errors[0] <= 2 * errors[1],
            )
        )
    return [*findings, _activation(device), _rotation(device), _norm(device)]


def _activation(device: torch.device) -> Finding:
    """Compare Megatron's fused SwiGLU with the plain one, forward and backward."""
    from megatron.core.fusions.fused_bias_swiglu import bias_swiglu_impl

    values = torch.randn(256, 352, device=device).to(torch.bfloat16).requires_grad_()

    def plain(wide: Tensor) -> Tensor:
        gate, up = wide.chunk(2, -1)
        return torch.nn.functional.silu(gate) * up

    return _against_fp64(
        "SwiGLU, fused, bf16", values, lambda each: bias_swiglu_impl(each, None), plain
    )


def _rotation(device: torch.device) -> Finding:
    """Compare the rotation of queries with fp64, forward and backward; it is compiled on a GPU."""
    kernel = RotaryKernel(compiled=device.type == "cuda" and can_compile())
    rates = 500_000.0 ** -(torch.arange(64, device=device) / 64)
    angles = torch.arange(512, device=device).outer(rates).repeat(1, 2)[:, None, None]
    values = torch.randn(512, 2, 3, 128, device=device).to(torch.bfloat16).requires_grad_()

    def plain(wide: Tensor) -> Tensor:
        first, second = wide.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return wide * angles.double().cos() + turned * angles.double().sin()

    return _against_fp64(
        "RoPE, bf16", values, lambda each: kernel(each, angles, interleaved=False), plain
    )


def _against_fp64(
    subject: str,
    values: Tensor,
    fused: Callable[[Tensor], Tensor],
    plain: Callable[[Tensor], Tensor],
) -> Finding:
    """Compare a fused function of bf16 values with the plain one in fp64, forward and backward."""
    ours, wide = fused(values), values.detach().double().requires_grad_()
    theirs, gradient = plain(wide), torch.randn_like(ours)
    backward = (
        torch.autograd.grad(ours, values, gradient)[0],
        torch.autograd.grad(theirs, wide, gradient.double())[0],
    )
    errors = [relative_error(a, b) for a, b in ((ours, theirs), backward)]
    bound = 2 * ULP[torch.bfloat16]
    return Finding(
        "T9",
        subject,
        f"error {errors[0]:.1e} forward, {errors[1]:.1e} backward, {bound:.1e} allowed",
        max(errors) <= bound,
    )


def _norm(device: torch.device) -> Finding:
    """Compare the norm of many gradients with fp64."""
    tensors = [torch.randn(1 + 9973 * index, device=device) for index in range(40)]
    norm, _ = norm_of_all(0, torch.zeros(1, device=device), [tensors], False)
    exact = torch.stack([each.double().square().sum() for each in tensors]).sum().sqrt()
    error = abs(float(norm[0]) / float(exact) - 1)
    bound = 64 * ULP[torch.float32]  # squares are added in blocks, which are added in turn
    return Finding("T9", "gradient norm", f"error {error:.1e}, {bound:.1e} allowed", error <= bound)
