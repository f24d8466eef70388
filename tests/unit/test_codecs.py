"""Codecs lose what they say at most, send the bytes that they say, and repeat themselves."""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_muloco.compress import codec, statistical
from megatron_muloco.compress.codec import Codec, Uncoded
from megatron_muloco.compress.format import Bins, CodingUnit, Granularity, Grouping, TopKFormat
from megatron_muloco.compress.quantizers import E3M0, Linear
from megatron_muloco.compress.statistical import Statistical
from megatron_muloco.compress.topk import TopK
from megatron_muloco.errors import SyncError
from tests.support.tensors import assert_equal

EPS = 2.0**-24  # half an ulp of fp32, relative
TINY = 2.0**-149  # the smallest number above 0
GRANULARITIES: tuple[Granularity, ...] = ("tensor", "row", "block")
BITS = (8, 4, 2, 1)
RULES: tuple[Bins, ...] = ("least_error", "centred", "edged")

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "constant": lambda x: torch.full_like(x, -1.7),
    "outliers": lambda x: x.pow(9),
    "far from zero": lambda x: 1000.0 + x,
    "huge": lambda x: x.sign() * 3.4e38 / (1 + x.abs()),
    "subnormal": lambda x: (x * 40).round() * TINY,
    "two values": lambda x: (x > 0).float(),
}


def draw(shape: str, numel: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return SHAPES[shape](torch.randn(numel, generator=generator))


def decoded(codec: Codec, values: Tensor, unit: CodingUnit) -> Tensor:
    """Encode, count, move to an odd address, decode over garbage."""
    kept = values.clone()
    payload = codec.encode(values, unit)
    assert payload.dtype == torch.uint8
    assert payload.numel() == codec.payload_bytes(unit) <= unit.raw_bytes
    assert_equal(values, kept)
    assert_equal(codec.encode(values, unit), payload, "encoded again")
    elsewhere = torch.cat([torch.zeros(1, dtype=torch.uint8), payload])[1:]
    out = torch.full_like(values, math.nan)
    codec.decode(elsewhere, unit, out)
    return out


def groups_of(values: Tensor, unit: CodingUnit, grouping: Grouping) -> list[Tensor]:
    """Cut by the plain meaning of the words, one value at a time."""
    key = {
        "tensor": lambda i: 0,
        "row": lambda i: (i + unit.row_offset) // unit.row_width if unit.row_width else 0,
        "block": lambda i: i // grouping.block_size,
    }[grouping.granularity]
    keys = torch.tensor([key(i) for i in range(unit.numel)])
    return [values[keys == each] for each in keys.unique()]


def group_slices(values: Tensor, unit: CodingUnit, grouping: Grouping) -> list[Tensor]:
    """The same for many values, by the widths that `Grouping` gives."""
    parts = grouping.groups(unit).matrices()
    return list(values.split([width for count, width in parts for _ in range(count)]))


units = st.builds(
    lambda numel, width, offset: CodingUnit(numel, width, offset % max(1, width)),
    st.integers(0, 300),
    st.integers(0, 90),
    st.integers(0, 89),
)
groupings = st.builds(Grouping, st.sampled_from(GRANULARITIES), st.sampled_from([1, 16, 64, 256]))
shapes = st.sampled_from(list(SHAPES))
seeds = st.integers(0, 99)


@given(unit=units, grouping=groupings)
def test_groups_partition_the_unit_as_the_words_say(unit: CodingUnit, grouping: Grouping) -> None:
    groups = grouping.groups(unit)
    widths = [width for count, width in groups.matrices() for _ in range(count)]
    expected = groups_of(torch.arange(unit.numel), unit, grouping) if unit.numel else []
    assert widths == [len(group) for group in expected]
    assert groups.number == len(widths)


def linear_bound(group: Tensor, bits: int) -> float:
    steps = 2**bits - 1
    low, high = float(group.min()), float(group.max())
    # The place of a value among the steps takes four roundings, the level one. Below the normal
    # numbers a step is rounded absolutely, by TINY, up to ``steps`` times; halving doubles that.
    rounding = 4 * EPS * (high - low) + EPS * max(abs(low), abs(high)) + 2 * (steps + 2) * TINY
    return (high - low) / (2 * steps) + rounding


def statistical_bound(group: Tensor, bits: int, widths: float = 1.0) -> float:
    """Bound of an error; ``widths`` is that of the widest bin between the outermost edges."""
    values = group.double()
    mean, sigma = float(values.mean()), float(values.std(correction=0))
    beyond = max(0.0, float((values - mean).abs().max()) - 3 * sigma)
    # Edges lie where ``(x - mean) * bins / (6 sigma) + bins / 2`` crosses an integer: fp32 mean
    # (EPS * |mean|), and three roundings of numbers up to 6 sigma. Means: 2**-21 sigma, and EPS of
    # the value. Where 6 sigma / bins is below 1 / the largest fp32, all values share a bin.
    largest = float(values.abs().max())
    rounding = 8 * EPS * (6 * sigma + largest) + 2**-21 * sigma + 2 * TINY
    return widths * 6 * sigma / 2**bits + beyond + rounding + (6 * sigma if sigma < 1e-37 else 0.0)


@given(shape=shapes, unit=units, grouping=groupings, bits=st.sampled_from(BITS), seed=seeds)
def test_linear(shape: str, unit: CodingUnit, grouping: Grouping, bits: int, seed: int) -> None:
    values = draw(shape, unit.numel, seed)
    result = decoded(Linear(bits, grouping), values, unit)
    for exact, found in zip(
        groups_of(values, unit, grouping), groups_of(result, unit, grouping), strict=True
    ):
        if len(exact):
            error = (found.double() - exact.double()).abs().max()
            assert error <= linear_bound(exact, bits)
            if shape != "subnormal":
                assert torch.equal(found.min(), exact.min())
                assert torch.equal(found.max(), exact.max())


@given(
    shape=shapes,
    unit=units,
    grouping=groupings,
    bits=st.sampled_from(BITS),
    rule=st.sampled_from(RULES),
    seed=seeds,
)
def test_statistical(
    shape: str, unit: CodingUnit, grouping: Grouping, bits: int, rule: Bins, seed: int
) -> None:
    values = draw(shape, unit.numel, seed)
    result = decoded(Statistical(bits, grouping, rule), values, unit)
    # The last bin of centred ones is 1.5 wide. With 8 bits least_error is edged; else it has no
    # bound for a single value, but the one below for all.
    widths = {"edged": 1.0, "centred": 1.5, "least_error": 1.0 if bits == 8 else math.inf}[rule]
    for exact, found in zip(
        groups_of(values, unit, grouping), groups_of(result, unit, grouping), strict=True
    ):
        if len(exact):
            error = found.double() - exact.double()
            if widths < math.inf:
                assert error.abs().max() <= statistical_bound(exact, bits, widths)
            # Each bin's errors cancel, but for 2**-21 sigma and the rounding of its mean.
            sigma, largest = float(exact.double().std(correction=0)), float(exact.abs().max())
            assert abs(error.mean()) <= 2**-21 * sigma + EPS * largest + TINY


def slow_statistical(values: Tensor, bits: int, rule: Bins) -> Tensor:
    """Return decoded values of one group by exact integers, one value and one bin at a time."""
    mean, sigma = (float(each) for each in statistical._moments(values[None]))
    scale = 2.0**20 / sigma if sigma else 0.0
    steps = [round((float(x) - mean) * scale) for x in values]
    cells, width = (256, 2**16) if len(values) >= 4096 else (64, 3 * 2**16)
    if bits == 8:
        cells, width = 256, 3 * 2**13
    shift = width // 2 if bits == 8 and rule == "centred" else 0
    cell_of = [min(max((x + shift) // width + cells // 2, 0), cells - 1) for x in steps]

    def score(edges: list[int]) -> float:
        total = 0.0
        for count, summed in contents(edges):
            total += float(summed) * float(summed) / max(count, 1)
        return total

    def contents(edges: list[int]) -> list[tuple[int, int]]:
        members = [
            [x for x, cell in zip(steps, cell_of, strict=True) if low <= cell < high]
            for low, high in pairwise(edges)
        ]
        return [(len(each), sum(each)) for each in members]

    def moved(edges: list[int]) -> list[int]:
        means = []
        for (count, summed), (low, high) in zip(contents(edges), pairwise(edges), strict=True):
            nearest = min(max(0, low - cells // 2), high - cells // 2)
            means.append(summed / count / width if count else float(nearest))
        middles = ((left + right) / 2 + cells // 2 for left, right in pairwise(means))
        return [0, *(min(max(round(each), 0), cells) for each in middles), cells]

    def of_rule(name: str) -> list[int]:
        half_bins = 6 * 2**20 // 2**bits // 2
        places = range(1, 2**bits)
        at = [(2 * k - 2**bits - (name == "centred")) * half_bins for k in places]
        return [0, *(each // width + cells // 2 for each in at), cells]

    if bits == 8:
        edges = list(range(cells + 1))
    elif rule == "least_error":
        candidates = [of_rule("edged"), of_rule("centred")]
        last = list(candidates)
        for _ in range(6 if cells == 256 else 2):
            last = [moved(each) for each in last]
        edges = max(candidates + last, key=score)  # the first of equals
    else:
        edges = of_rule(rule)
    result = torch.empty_like(values)
    for (low, high), (count, summed) in zip(pairwise(edges), contents(edges), strict=True):
        for place, cell in enumerate(cell_of):
            if low <= cell < high:
                result[place] = mean + summed / count * (1 / scale if scale else 0.0)
    return result


@given(
    shape=shapes,
    numel=st.integers(40, 300),
    bits=st.sampled_from(BITS),
    rule=st.sampled_from(RULES),
    seed=seeds,
)
def test_statistical_is_its_slow_reference(
    shape: str, numel: int, bits: int, rule: Bins, seed: int
) -> None:
    values, codec = draw(shape, numel, seed), Statistical(bits, Grouping(), rule)
    unit = CodingUnit(numel)
    if codec.payload_bytes(unit) < unit.raw_bytes:
        assert_equal(decoded(codec, values, unit), slow_statistical(values, bits, rule))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_statistical_is_its_slow_reference_in_a_wide_group(shape: str, bits: int) -> None:
    values, unit = draw(shape, 4100, 8), CodingUnit(4100)
    result = decoded(Statistical(bits, Grouping()), values, unit)
    assert_equal(result, slow_statistical(values, bits, "least_error"))


@pytest.mark.parametrize("width", [200, 4100], ids=["narrow", "wide"])
def test_rows_choose_their_bins_by_themselves(width: int) -> None:
    """Rows of different shapes in one matrix have the bits that each has alone."""
    rows = torch.stack([draw(shape, width, 3) for shape in ("normal", "outliers", "two values")])
    skewed = draw("normal", width, 4).exp()
    values = torch.cat([rows.flatten(), skewed])
    for bits in (4, 2, 1):
        codec = Statistical(bits, Grouping("row"))
        result = decoded(codec, values, CodingUnit(values.numel(), width))
        for row, found in zip(values.split(width), result.split(width), strict=True):
            assert_equal(found, slow_statistical(row, bits, "least_error"))


def squared_error(codec: Codec, values: Tensor) -> float:
    error = decoded(codec, values, CodingUnit(values.numel())).double() - values.double()
    return float(error.square().sum())


@given(
    shape=shapes, numel=st.sampled_from([50, 300, 4095, 4096, 20_000]), bits=st.sampled_from(BITS)
)
def test_the_least_error_is_at_most_that_of_either_rule(shape: str, numel: int, bits: int) -> None:
    values = draw(shape, numel, 7)
    least, *others = (squared_error(Statistical(bits, Grouping(), rule), values) for rule in RULES)
    # The choice is exact for values rounded to 2**-21 sigma and means that are not rounded to fp32.
    # A rounding of r in every value changes the root of the mean square by at most r.
    rounding = 2**-21 * float(values.double().std(correction=0)) + EPS * float(values.abs().max())
    root = math.sqrt(min(others) / numel)
    if bits < 8:
        assert math.sqrt(least / numel) <= root + 2 * rounding + TINY
    else:
        assert least == others[RULES[1:].index("edged")]


def test_each_rule_is_the_better_one_somewhere() -> None:
    """Two bits: a peak at the mean needs a bin around it, two clusters an edge between them."""
    peak, clusters = draw("outliers", 8192, 1), draw("normal", 8192, 1)
    clusters = clusters + 6 * clusters.sign()
    of_peak, of_clusters = (
        {rule: squared_error(Statistical(2, Grouping(), rule), values) for rule in RULES}
        for values in (peak, clusters)
    )
    assert of_peak["least_error"] <= of_peak["centred"] < of_peak["edged"]
    assert of_clusters["least_error"] <= of_clusters["edged"] < of_clusters["centred"]


def test_rounding_is_the_public_codes_rule() -> None:
    """Codes of centred bins are ``round((x - mean) / (6 sigma / n) + n // 2)`` but for ties."""
    values = draw("normal", 3000, 9)
    for bits in BITS:
        count, unit = 2**bits, CodingUnit(3000)
        payload = Statistical(bits, Grouping(), "centred").encode(values, unit)
        codes = codec.unpack(payload[4 * count :], bits, 3000)
        each = values.double()
        place = (each - each.mean()) / (6 * each.std(correction=0) / count) + count // 2
        expected = place.round().clamp(0, count - 1) + 0.0  # no -0.0
        sure = (place - place.floor() - 0.5).abs() > 2**-20 * count
        assert sure.sum() > 2900
        assert_equal(codes[sure].double(), expected[sure])


@given(shape=shapes, unit=units, grouping=groupings, seed=seeds)
def test_e3m0(shape: str, unit: CodingUnit, grouping: Grouping, seed: int) -> None:
    values = draw(shape, unit.numel, seed)
    result = decoded(E3M0(grouping), values, unit)
    for exact, found in zip(
        groups_of(values, unit, grouping), groups_of(result, unit, grouping), strict=True
    ):
        if len(exact):
            largest = exact.abs().max().double()
            bound = torch.maximum(exact.double().abs() / 3, largest / 128)
            error = (found.double() - exact.double()).abs()
            assert (error <= bound * (1 + 4 * EPS) + TINY).all()
            assert found.abs().max() == exact.abs().max()


densities = st.sampled_from([0.005, 0.02, 0.1, 0.3, 1.0])
block_sizes = st.sampled_from([1, 10, 64, 4096])
wire_dtypes = st.sampled_from(["fp32", "bf16"])


def topk(density: float, wire_dtype: str, block_size: int, value_bits: int | None = None) -> TopK:
    return TopK(density, "bf16" if wire_dtype == "bf16" else "fp32", block_size, value_bits)


def assert_chooses_the_largest(codec: TopK, exact: Tensor, found: Tensor) -> Tensor:
    """Return, for each value, the smallest magnitude that its block keeps."""
    size, thresholds = TopKFormat(codec.density, 4, codec.grouping), []
    blocks = (each.split(codec.grouping.block_size) for each in (exact, found))
    for given_block, found_block in zip(*blocks, strict=True):
        kept = size.kept(len(given_block))
        threshold = given_block.abs().sort(descending=True).values[kept - 1]
        # Above the threshold everything is kept, below nothing; at it (ties), either.
        assert (found_block[given_block.abs() < threshold] == 0).all()
        assert (found_block != 0).sum() <= kept
        thresholds.append(threshold.expand(len(given_block)))
    return torch.cat(thresholds)


@given(
    shape=shapes,
    numel=st.integers(0, 300),
    density=densities,
    block_size=block_sizes,
    wire_dtype=wire_dtypes,
    seed=seeds,
)
def test_topk_keeps_the_largest(
    shape: str, numel: int, density: float, block_size: int, wire_dtype: str, seed: int
) -> None:
    unit = CodingUnit(numel)
    values = draw(shape, numel, seed)
    codec = topk(density, wire_dtype, block_size)
    result = decoded(codec, values, unit)
    if codec.payload_bytes(unit) == unit.raw_bytes:
        assert_equal(result, values)
        return
    thresholds = assert_chooses_the_largest(codec, values, result).double()
    relative = 2.0**-8 if wire_dtype == "bf16" else 0.0  # 2**-9, or the clamp at the top
    # bf16 has the exponents of fp32 and 16 bits less: TINY * 2**15 is half its smallest number.
    slack = TINY * 2**15 if wire_dtype == "bf16" else 0.0
    error, magnitudes = (result.double() - values.double()).abs(), values.abs().double()
    rounding = relative * magnitudes + slack
    sure = magnitudes > thresholds
    assert (error[sure] <= rounding[sure]).all()
    assert (error <= thresholds + rounding).all()


@given(
    shape=shapes,
    numel=st.integers(1, 2000),
    density=densities,
    block_size=block_sizes,
    wire_dtype=wire_dtypes,
    bits=st.sampled_from(BITS),
    seed=seeds,
)
def test_topk_with_coded_values(
    shape: str, numel: int, density: float, block_size: int, wire_dtype: str, bits: int, seed: int
) -> None:
    unit = CodingUnit(numel)
    values = draw(shape, numel, seed)
    codec, plain = (topk(density, wire_dtype, block_size, each) for each in (bits, None))
    result = decoded(codec, values, unit)
    sizes = TopKFormat(density, 2 if wire_dtype == "bf16" else 4, codec.grouping, bits)
    kept = sum(sizes.kept(len(block)) for block in values.split(block_size))
    if codec.payload_bytes(unit) == unit.raw_bytes or not sizes.is_coded(kept):
        assert codec.payload_bytes(unit) == plain.payload_bytes(unit)
        assert_equal(result, decoded(plain, values, unit), "without a table that pays")
        return
    assert codec.payload_bytes(unit) < plain.payload_bytes(unit)
    thresholds = assert_chooses_the_largest(codec, values, result).double()
    # Choosing comes before coding, so that exact values say what was chosen, but for zeros.
    chosen = decoded(topk(density, "fp32", block_size), values, unit)
    sent = chosen[chosen != 0]
    sent = torch.cat([sent, torch.zeros(kept - len(sent))])
    error = (result.double() - values.double()).abs()
    left_out = (chosen == 0) & (values != 0)
    assert (error[left_out] <= thresholds[left_out]).all()
    # What is sent is coded as by itself: no worse than by either rule for the edges.
    edged = decoded(Statistical(bits, Grouping(), "edged"), sent, CodingUnit(kept)).double()
    sent_error = float(error[~left_out].square().sum())
    largest, sigma = float(sent.abs().max()), float(sent.double().std(correction=0))
    rounding = 2**-20 * sigma + 2 * EPS * largest + TINY
    root = math.sqrt(float((edged - sent.double()).square().mean()))
    assert math.sqrt(sent_error / kept) <= root + rounding
    # Errors cancel over what is sent, as in `test_statistical`.
    drift = float((result.double() - chosen.double()).sum()) / kept
    assert abs(drift) <= 2**-21 * sigma + EPS * largest + TINY


def test_one_bit_of_a_value_sent_keeps_its_sign() -> None:
    unit = CodingUnit(4096 * 4)
    values = draw("normal", unit.numel, 5)
    result = decoded(TopK(1 / 32, value_bits=1), values, unit)
    exact = decoded(TopK(1 / 32), values, unit)
    assert_equal(result.sign(), exact.sign())
    assert len(result.unique()) == 3


CODECS = {
    **{
        f"{kind.__name__} {bits} {granularity}": kind(bits, Grouping(granularity, 64))
        for kind in (Linear, Statistical)
        for bits in BITS
        for granularity in GRANULARITIES
    },
    **{f"Statistical {bits} centred": Statistical(bits, Grouping(), "centred") for bits in BITS},
    "Statistical 2 edged": Statistical(2, Grouping(), "edged"),
    **{f"E3M0 {each}": E3M0(Grouping(each, 64)) for each in GRANULARITIES},
    "TopK": TopK(0.02),
    "TopK bf16 mask": TopK(0.3, "bf16"),
    **{f"TopK coded {bits}": TopK(0.1, "bf16", 1024, bits) for bits in BITS},
    "Uncoded": Uncoded(),
}
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())


@every_codec
def test_an_empty_unit_has_no_payload(codec: Codec) -> None:
    assert codec.payload_bytes(CodingUnit(0)) == 0
    assert decoded(codec, torch.empty(0), CodingUnit(0)).numel() == 0


@every_codec
@pytest.mark.parametrize("value", [0.0, -3.5, 3.4e38, TINY])
def test_one_value_is_exact(codec: Codec, value: float) -> None:
    if isinstance(codec, TopK) and codec is not CODECS["TopK"]:
        pytest.skip("a bf16 and its place are less than an fp32")
    values = torch.tensor([value])
    assert_equal(decoded(codec, values, CodingUnit(1)), values)


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("numel", [1, 2000])
def test_non_finite_values_are_refused(codec: Codec, bad: float, numel: int) -> None:
    values = torch.randn(numel, generator=torch.Generator().manual_seed(3))
    values[numel // 2] = bad
    with pytest.raises(SyncError, match="not finite"):
        codec.encode(values, CodingUnit(numel, 40))


# Longer than a block: many rows, rows longer than a block, an odd rest.
LONG = [CodingUnit(300_001, 700, 5), CodingUnit(300_001, 140_000, 9)]


@every_codec
@pytest.mark.parametrize("unit", LONG, ids=["short rows", "long rows"])
def test_units_larger_than_the_blocks_they_are_worked_on_in(codec: Codec, unit: CodingUnit) -> None:
    values = draw("normal", unit.numel, 1)
    error = decoded(codec, values, unit) - values
    # 1 bit, centred, is the worst: the mean of its upper bin is hardly above that of all values.
    # This bound also covers half the range, the worst of 1 bit, linear.
    assert error.abs().max() <= (values - values.mean()).abs().max() + 1e-5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_bin_means_over_many_blocks(bits: int, granularity: Granularity) -> None:
    """The errors of each group cancel, whichever blocks it went through."""
    unit, grouping = LONG[1], Grouping(granularity, 1000)
    values = draw("normal", unit.numel, 4)
    result = decoded(Statistical(bits, grouping), values, unit)
    for exact, found in zip(
        group_slices(values, unit, grouping), group_slices(result, unit, grouping), strict=True
    ):
        # As in `test_statistical`, of numbers below 8.
        assert abs((found.double() - exact.double()).mean()) <= 2**-21 + 8 * EPS


@every_codec
def test_payloads_do_not_depend_on_the_number_of_threads(codec: Codec) -> None:
    unit = LONG[0]
    values = draw("outliers", unit.numel, 6)
    before, payloads = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            payloads.append(codec.encode(values, unit))
    finally:
        torch.set_num_threads(before)
    assert_equal(*payloads)


def test_moments_do_not_depend_on_the_number_of_threads() -> None:
    """To the last bit of fp64, which a payload would show only now and then."""
    values = draw("outliers", 300_001, 6)[None]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat(statistical._moments(values)))
    finally:
        torch.set_num_threads(before)
    assert_equal(*found)


def test_statistical_beats_linear_at_two_bits() -> None:
    values, unit = draw("normal", 10_000, 2), CodingUnit(10_000)
    errors = [
        (decoded(kind(2, Grouping()), values, unit) - values).norm()
        for kind in (Statistical, Linear)
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize(("bits", "factor"), [(4, 7.8), (2, 15.0)])
@pytest.mark.parametrize("kind", [Linear, Statistical])
def test_compression_of_units_of_a_useful_size(
    kind: type[Linear | Statistical], bits: int, factor: float
) -> None:
    unit = CodingUnit(8192)
    assert unit.raw_bytes >= factor * kind(bits, Grouping()).payload_bytes(unit)


def test_places_take_no_more_than_their_bits() -> None:
    unit = CodingUnit(4096 * 10)
    kept = 82 * 10  # 2 % of 4,096
    assert TopK(0.02).payload_bytes(unit) == kept * 4 + kept * 12 // 8
    assert TopK(0.5, "bf16").payload_bytes(unit) == 2048 * 10 * 2 + unit.numel // 8
    coded = TopK(0.02, value_bits=2).payload_bytes(unit)
    assert coded == 4 * 4 + kept * 2 // 8 + kept * 12 // 8


def test_sizes_are_known_without_torch() -> None:
    code = (
        "import sys, megatron_muloco.compress.codecs, megatron_muloco.comm.costs; "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
