"""Single parts on one device: T0, T1, T3, T4, T5 and, where timed, B2, B3 and B4."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

from megatron_muloco.comm.background import beside_training
from megatron_muloco.comm.compressed import build_compressed_reducer_for
from megatron_muloco.comm.reducers import PhasedReducer, build_plain_reducer_for
from megatron_muloco.compress.codec import Codec
from megatron_muloco.compress.format import CodingUnit, Grouping
from megatron_muloco.compress.quantizers import E3M0, Linear
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.compress.topk import TopK
from megatron_muloco.config.outer import (
    LinearCompression,
    StatisticalCompression,
    TopKCompression,
)
from megatron_muloco.errors import ConfigError
from megatron_muloco.model.attention import AttentionBackend, DenseAttention, document_mask
from megatron_muloco.model.attention_backends import choose_attention
from megatron_muloco.monitor.throughput import peak_tflops
from megatron_muloco.optim.matrices import newton_schulz_flops
from megatron_muloco.optim.newton_schulz import NSImplementation, newton_schulz
from megatron_muloco.outer.reducer import Reducer
from tools.gpu.findings import Finding
from tools.gpu.inside import run_config

__all__ = [
    "attention",
    "background",
    "background_briefly",
    "ceilings",
    "codecs",
    "milliseconds",
    "newton_schulz_check",
    "relative_error",
]

WARM_UP, REPEATS = 3, 10
STEPS = 5
# Whole matrices of the 15B model: gate and up (transposed down), and the square ones.
SHAPES_15B = ((4608, 12672), (4608, 4608))
# Bounds on |out - fp64| / |out|. Five steps amplify a rounding of a small singular value by up to
# 4^5 = 1,024: of 6e-8 in fp32, and of 4e-3 in bf16, where only the few small ones are that far off.
NS_BOUNDS = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Attention in bf16: values and probabilities have 8 bits, 4e-3 each.
ATTENTION_BOUND = 2e-2


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the median time of a call, by events of the stream or by the host's clock."""
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(REPEATS):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)


def rate(amount: float, call: Callable[[], object], device: torch.device) -> float:
    """Return ``amount`` per second of a call, in units of 1e9."""
    return amount / milliseconds(call, device) / 1e6


def relative_error(values: Tensor, exact: Tensor) -> float:
    """Return ``|values - exact| / |exact|``, in fp64."""
    exact = exact.double()
    return float((values.double() - exact).norm() / exact.norm())


# ---- what the device can do ----------------------------------------------------------------------


def ceilings(device: torch.device) -> list[Finding]:
    """Measure matrix products and copies, to which the other figures are compared."""
    large = device.type == "cuda"
    size, numel = (8192, 1 << 28) if large else (128, 1 << 16)
    name, text = versions(device)
    findings = [Finding("T0", f"versions on {name}", text)]
    if large:
        peak = peak_tflops(name, "bf16")
        known = "n/a: no MFU here" if peak is None else f"{peak:,.0f} TFLOP/s"
        findings.append(Finding("T0", "peak of bf16 that the program knows", known))
    for dtype in (torch.bfloat16, torch.float32):
        left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        tflops = rate(2 * size**3, lambda a=left, b=right: a @ b, device) / 1e3  # type: ignore[misc]
        findings.append(Finding("B3", f"{size}^3 product, {dtype}", f"{tflops:.1f} TFLOP/s"))
    source, target = (torch.randn(numel, device=device) for _ in range(2))
    gigabytes = rate(8 * numel, lambda: target.copy_(source), device)
    findings.append(Finding("B3", "copy on the device, read and written", f"{gigabytes:,.0f} GB/s"))
    host = torch.randn(numel, pin_memory=large)
    for way, call in (
        ("from", lambda: target.copy_(host, non_blocking=True)),
        ("to", lambda: host.copy_(target, non_blocking=True)),
    ):
        gigabytes = rate(4 * numel, call, device)
        findings.append(Finding("B3", f"copy {way} pinned memory", f"{gigabytes:.1f} GB/s"))
    return findings


def versions(device: torch.device) -> tuple[str, str]:
    """Return the name of the device and the versions of what runs on it."""
    from importlib.metadata import version

    packages = ", ".join(f"{name} {version(name)}" for name in ("megatron-core", "deepspeed"))
    software = f"torch {torch.__version__}, {packages}"
    if device.type != "cuda":
        return "this CPU", software
    nccl = ".".join(str(part) for part in torch.cuda.nccl.version())
    software += f", CUDA {torch.version.cuda}, NCCL {nccl}, cuDNN {torch.backends.cudnn.version()}"
    return torch.cuda.get_device_name(device), software


# ---- Newton-Schulz -------------------------------------------------------------------------------


def newton_schulz_check(device: torch.device) -> list[Finding]:
    """Compare every implementation with fp64 and time it on the shapes of the 15B model."""
    large = device.type == "cuda"
    variants: tuple[tuple[torch.dtype, NSImplementation], ...] = (
        (torch.bfloat16, "plain"),
        (torch.float32, "plain"),
        (torch.float32, "triangle"),
        (torch.float32, "gram"),
    )
    findings: list[Finding] = []
    for shape in ((1024, 2816), (1024, 1024)) if large else ((64, 176),):
        generator = torch.Generator().manual_seed(0)
        matrix = torch.randn(3, *shape, generator=generator).to(device)
        exact = newton_schulz(matrix, steps=STEPS, dtype=torch.float64, impl="plain")
        for dtype, impl in variants:
            result = newton_schulz(matrix, steps=STEPS, dtype=dtype, impl=impl)
            alone = newton_schulz(matrix[1], steps=STEPS, dtype=dtype, impl=impl)
            error = relative_error(result, exact)
            values, wanted = _singular_values(result), _singular_values(exact)
            findings.append(
                Finding(
                    "T3",
                    f"Newton-Schulz {shape}, {impl}, {dtype}",
                    f"error {error:.1e}; singular values {values.min():.3f} to {values.max():.3f}, "
                    f"fp64 {wanted.min():.3f} to {wanted.max():.3f}; "
                    f"same bits alone as in a batch: {torch.equal(alone, result[1])}",
                    error <= NS_BOUNDS[dtype],
                )
            )
    for shape in SHAPES_15B if large else SHAPES_15B[:0]:
        matrix = torch.randn(*shape, device=device)
        for dtype, impl in variants:
            findings.append(_newton_schulz_speed(matrix, dtype, impl, device))
    return findings


def _singular_values(matrices: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrices.double())


def _newton_schulz_speed(
    matrix: Tensor, dtype: torch.dtype, impl: NSImplementation, device: torch.device
) -> Finding:
    """Time one matrix; the rate counts the FLOPs that the implementation makes."""
    flops = newton_schulz_flops(*matrix.shape, STEPS, impl)
    took = milliseconds(lambda: newton_schulz(matrix, steps=STEPS, dtype=dtype, impl=impl), device)
    left, right = matrix.to(dtype), matrix.mT.to(dtype).contiguous()
    rows, columns = matrix.shape
    product = rate(2 * rows * rows * columns, lambda: left @ right, device) / 1e3
    tflops = flops / took / 1e9
    return Finding(
        "B3",
        f"Newton-Schulz {tuple(matrix.shape)}, {impl}, {dtype}, time",
        f"{took:.2f} ms, {tflops:.0f} TFLOP/s, {tflops / product:.0%} of X X^T alone "
        f"({product:.0f} TFLOP/s)",
    )


# ---- codecs --------------------------------------------------------------------------------------


def codecs(device: torch.device) -> list[Finding]:
    """Compare payloads of the device with those of the CPU, byte by byte, and time both ways."""
    large = device.type == "cuda"
    numel = 1 << 20 if large else 1 << 14
    generator = torch.Generator().manual_seed(0)
    scales = torch.randn(numel, generator=generator).div_(2).exp_()
    values = torch.randn(numel, generator=generator).mul_(scales).mul_(1e-3)
    there = values.to(device)
    much = there.repeat(64 if large else 1)
    groupings = {"tensor": Grouping(), "block": Grouping("block", 256)}
    variants: dict[str, Codec] = {"e3m0, tensor": E3M0(groupings["tensor"])}
    for name, grouping in groupings.items():
        for bits in (8, 4, 2, 1):
            variants[f"statistical {bits}, {name}"] = Statistical(bits, grouping)
            variants[f"linear {bits}, {name}"] = Linear(bits, grouping)
    variants["top-k 1/32"] = TopK(1 / 32)
    variants["top-k 1/32, values x 4"] = TopK(1 / 32, value_bits=4)
    return [
        finding
        for name, codec in sorted(variants.items())
        for finding in _codec(name, codec, values, there, much, device)
    ]


def _codec(
    name: str, codec: Codec, values: Tensor, there: Tensor, much: Tensor, device: torch.device
) -> list[Finding]:
    unit, larger = CodingUnit(values.numel()), CodingUnit(much.numel())
    here, payload = codec.encode(values, unit), codec.encode(there, unit)
    differing = int((here != payload.cpu()).sum())
    repeated = torch.equal(payload, codec.encode(there, unit))
    on_host, on_device = torch.empty_like(values), torch.empty_like(there)
    codec.decode(here, unit, on_host)
    codec.decode(here.to(device), unit, on_device)
    decoded = torch.equal(on_host, on_device.cpu())
    out, coded = torch.empty_like(much), codec.encode(much, larger)
    encode = rate(4 * much.numel(), lambda: codec.encode(much, larger), device)
    decode = rate(4 * much.numel(), lambda: codec.decode(coded, larger, out), device)
    return [
        Finding(
            "T1",
            f"codec {name}",
            f"{differing} of {here.numel():,} bytes differ from the CPU's; encoded twice: "
            f"{'equal' if repeated else 'DIFFERENT'}; decoded as on the CPU: {decoded}",
            repeated and decoded and differing == 0,
        ),
        Finding("B4", f"codec {name}", f"encode {encode:.1f}, decode {decode:.1f} GB/s"),
    ]


# ---- attention -----------------------------------------------------------------------------------


def attention(device: torch.device) -> list[Finding]:
    """Compare every attention backend with fp64, and time it on a GPU."""
    large = device.type == "cuda"
    length, heads, width = (2048, 9, 128) if large else (64, 3, 16)
    findings: list[Finding] = []
    for batch, groups in product((1, 4), (heads, heads // 3)):
        shapes = ((length, batch, heads, width), *((length, batch, groups, width),) * 2)
        parts = [
            torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)
            for shape in shapes
        ]
        documents = (torch.rand(batch, length) < 8 / length).cumsum(1)
        shape = f"{batch} sequences, {heads} heads over {groups}"
        findings += _sdpa_kernels(shape, parts, document_mask(documents.to(device)))
        for name in ("causal", "dense", "varlen", "flex"):
            backend, reason = _backend("dense" if name == "causal" else name, device)
            label = f"attention, {name}, {shape}"
            if backend is None:
                findings.append(Finding("T4", label, f"refused: {reason}"))
                continue
            given = None if name == "causal" else documents
            findings += _attention(label, backend, parts, given, device)
    return findings


def _backend(name: str, device: torch.device) -> tuple[AttentionBackend | None, str]:
    """Return the backend that a run would get, or why it is refused."""
    config = run_config(
        "none", {"model": {"attention_impl": name}, "training": {"precision": "bf16"}}
    )
    try:
        chosen = choose_attention(config, device)
    except ConfigError as error:
        return None, " ".join(str(error).split())[:200]
    return chosen.backend, chosen.reason


def _attention(
    label: str,
    backend: AttentionBackend,
    parts: Sequence[Tensor],
    documents: Tensor | None,
    device: torch.device,
) -> list[Finding]:
    scale = parts[0].shape[-1] ** -0.5
    known = None if documents is None else backend.documents(documents, device)

    def attend() -> Tensor:
        return backend.attend(parts[0], parts[1], parts[2], known, scale=scale)

    out = attend()
    gradient = torch.randn_like(out)
    # The first sequence is compared; others only have to leave it alone.
    found = [out, *torch.autograd.grad(out, parts, gradient)]
    wide = [each.detach().double()[:, :1].requires_grad_() for each in parts]
    exactly = DenseAttention()
    mask = None if documents is None else exactly.documents(documents[:1], device)
    exact = exactly.attend(wide[0], wide[1], wide[2], mask, scale=scale)
    expected = [exact, *torch.autograd.grad(exact, wide, gradient[:, :1].double())]
    errors = [relative_error(a[:, :1], b) for a, b in zip(found, expected, strict=True)]
    findings = [
        Finding(
            "T4",
            label,
            f"error {errors[0]:.1e} forward, {max(errors[1:]):.1e} backward",
            max(errors) <= ATTENTION_BOUND,  # also false for NaN
        )
    ]
    if device.type == "cuda":
        took = milliseconds(lambda: torch.autograd.grad(attend(), parts, gradient), device)
        findings.append(Finding("B2", label, f"forward and backward {took:.2f} ms"))
    return findings


def _sdpa_kernels(shape: str, parts: Sequence[Tensor], mask: Tensor) -> list[Finding]:
    """Return which kernel torch takes for the dense backend."""
    if not parts[0].is_cuda:
        return []
    query, key, value = (each.permute(1, 2, 0, 3) for each in parts)
    findings = []
    for name, hidden in (("causal", None), ("documents", mask)):
        choice = torch._fused_sdp_choice(
            query,
            key,
            value,
            attn_mask=None if hidden is None else ~hidden,
            is_causal=hidden is None,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        chosen = torch.nn.attention.SDPBackend(choice).name
        findings.append(Finding("T0", f"kernel, {name}, {shape}", chosen, chosen != "MATH"))
    return findings


# ---- reduction beside training -------------------------------------------------------------------


def background(device: torch.device) -> list[Finding]:
    """Reduce beside training, with late producers and reused memory, and compare bit by bit."""
    return _background(device, *((50, 3_000_000) if device.type == "cuda" else (5, 3_000)))


def background_briefly(device: torch.device) -> list[Finding]:
    """Do the same in few rounds, for runs without torch's allocator or under a memory checker."""
    return _background(device, 2, 30_000)


def _background(device: torch.device, rounds: int, numel: int) -> list[Finding]:
    lossy: Mapping[str, Any] = {
        "linear 4": LinearCompression(kind="linear", bits=4),
        "statistical 2": StatisticalCompression(kind="statistical", bits=2),
        "top-k": TopKCompression(kind="topk", density=0.02),
    }
    findings = []
    for through_host in (False, True):
        makers: dict[str, Callable[[], PhasedReducer]] = {
            name: lambda each=each: build_compressed_reducer_for(  # type: ignore[misc]
                None,
                device,
                each,
                {"a": (0, 0), "b": (0, 0)},
                {"a": None, "b": None},
                through_host=through_host,  # noqa: B023 - called in this iteration
            )
            for name, each in lossy.items()
        }
        makers["bf16"] = lambda: build_plain_reducer_for(
            None,
            device,
            wire_dtype="bf16",
            through_host=through_host,  # noqa: B023
        )
        for name, make in makers.items():
            wrong = _reduce_side_by_side(make(), make(), device, rounds, numel)
            way = "in a thread, host" if through_host else "in steps, device"
            findings.append(
                Finding(
                    "T5",
                    f"reduction of {name} {way} transport",
                    f"{wrong} of {rounds} results differ from the foreground's",
                    wrong == 0,
                )
            )
    return findings


def _reduce_side_by_side(
    foreground: Reducer, hidden: PhasedReducer, device: torch.device, rounds: int, numel: int
) -> int:
    """Return how many results beside training are not those of the same reducer alone."""
    beside = beside_training(hidden, device, overlap_steps=2)
    generator = torch.Generator(device).manual_seed(0)
    metadata, wrong = torch.zeros(3, device=device), 0
    for round_index in range(1, rounds + 1):
        values = torch.randn(numel, generator=generator, device=device)
        sources = {"a": torch.empty_like(values), "b": torch.empty(numel // 7, device=device)}
        if device.type == "cuda":
            torch.cuda._sleep(20_000_000)  # about 10 ms: the sources are written late
        sources["a"].copy_(values)
        sources["b"].copy_(values[: numel // 7]).mul_(3)
        handle = beside.launch(0, sources, 1.0, metadata, round_index=round_index)
        copies = {name: each.clone() for name, each in sources.items()}
        del sources
        for _ in range(8):  # would take the memory of sources that are freed too early
            torch.full((numel,), float("nan"), device=device)
        beside.advance(handle)
        reduced = beside.wait(handle)
        expected = foreground.wait(
            foreground.launch(0, copies, 1.0, metadata, round_index=round_index)
        )
        wrong += not all(torch.equal(reduced.mean[name], expected.mean[name]) for name in copies)
    return wrong
