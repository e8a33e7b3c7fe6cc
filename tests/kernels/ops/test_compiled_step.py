"""Compiled products with kept columns against float64, and that the bits do not depend on the number of threads."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from was_kernels.ops import host_compiler
from was_kernels.ops.column_bags import cutoffs
from was_kernels.ops.column_weight import ColumnWeight
from was_kernels.ops.compiled_step import CompiledStep, KeptGroup, KeptMap, spaced
from was_kernels.ops.correction import Correction
from was_kernels.ops.host_compiler import openmp_runtime
from was_kernels.ops.reference import kept_channels
from was_kernels.runtime.compiled_code import compiled_step, compiles_here
from was_search.checkpoints.rounding import quantise
from was_search.weight_format import WeightFormat

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((65, 33), (1, 1), (48, 97), (80, 48), (576, 192), (30, 4111), (2100, 64), (9, 8200))
"""Widths that no vector and no cache line divides, and both kinds of cutting: one part or several."""


@pytest.fixture(params=DTYPES, ids=str)
def step(request) -> CompiledStep:
    found = compiled_step(request.param)
    if found is None:
        pytest.skip(compiles_here(request.param)[1])
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    """For tests that choose how many threads there are."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(columns: Tensor, *others: Any) -> KeptMap:
    """A map of W by columns, [d, width]; then what else a map has."""
    return KeptMap(ColumnWeight.as_stored(columns), *others)


def rounded(columns: Tensor, form: WeightFormat, *others: Any) -> KeptMap:
    """The same with its numbers rounded."""
    packed, scales = quantise(columns.t(), form)
    return KeptMap(ColumnWeight(packed, scales, form.bits, form.group, columns.shape[1]), *others)


def corrected(width: int, seed: int) -> Correction:
    return Correction(1.0 + drawn(width, seed=seed) / 8, drawn(width, seed=seed + 1))


def exact(x: Tensor, given: KeptMap, dense: Tensor | None) -> tuple[Tensor, Tensor]:
    """The output in float64, and what its rounding is relative to."""
    keep = torch.ones_like(x, dtype=torch.bool) if given.cutoffs is None else x.abs() >= given.cutoffs
    flagged = torch.zeros(len(x), 1, dtype=torch.bool) if dense is None else dense[:, None]
    kept = torch.where(keep | flagged, x, 0.0).double()
    weight = given.weight.written_out().double()
    size = kept.abs() @ weight.abs()
    if given.weight.scales is not None:  # its numbers and offsets are summed apart
        size = (
            size
            + 2.0
            * (kept.abs() @ given.weight.scales[..., 1].double().abs()).repeat_interleave(given.weight.group, 1)[
                :, : given.weight.width
            ]
        )
    y = kept @ weight
    if given.correction is not None:
        scale, constant = given.correction.scale.double(), given.correction.constant.double()
        masked = y * scale + constant
        size = torch.where(flagged, size, size * scale.abs() + constant.abs())
    else:
        masked = y
    if given.bias is not None:
        y, masked = y + given.bias.double(), masked if given.correction is not None else y + given.bias.double()
        size = size + given.bias.double().abs()
    return torch.where(flagged, y, masked), size


def require_close(found: Tensor, expected: Tensor, size: Tensor, d: int) -> None:
    # A float32 sum of d products, rounded once.
    bound = torch.finfo(found.dtype).eps * expected.abs() + 2e-7 * (d + 4) * size + torch.finfo(found.dtype).tiny
    assert bool(((found.double() - expected).abs() <= bound).all())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, 17])
@pytest.mark.parametrize("kept", ["some", "none", "all", "none of one row"])
def test_equals_the_masked_products_in_float64(step, shape, rows, kept):
    d, width = shape
    x = drawn(rows, d).to(step.dtype)
    least = drawn(d, seed=2).abs().to(step.dtype)
    if kept in ("none", "all"):
        least[:] = torch.inf if kept == "none" else 0.0
    elif kept == "none of one row":
        least, x = least + 1e-3, x.clone()
        x[rows - 1] = 0.0
    columns = drawn(d, width, seed=1).to(step.dtype)
    bias = drawn(width, seed=3).to(step.dtype)
    maps = [
        stored(columns, least, bias),
        stored(drawn(d, 5, seed=4).to(step.dtype), None),
        stored(drawn(d, width + 1, seed=5).to(step.dtype), least.clone(), None, corrected(width + 1, 6)),
        stored(columns, least * 1.5, bias, corrected(width, 8)),
    ]
    for dense in (None, torch.arange(rows) % 3 == 1, torch.ones(rows, dtype=torch.bool)):
        found = step.products(KeptGroup(maps, step.dtype), x, dense)
        assert found.dtype == step.dtype and found.shape == (rows, 3 * width + 6)
        for part, given in zip(found.split([width, 5, width + 1, width], 1), maps, strict=True):
            require_close(part, *exact(x, given, dense), d)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_the_number_of_threads_changes_no_bit(step, shape, rows, threads):
    d, width = shape
    x, columns = drawn(rows, d).to(step.dtype), drawn(d, width, seed=1).to(step.dtype)
    least = drawn(d, seed=2).abs().to(step.dtype)
    group = KeptGroup([stored(columns, least), stored(columns, None, None, corrected(width, 3))], step.dtype)
    found = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        found.append(step.products(group, x))
    assert all(torch.equal(found[0], other) for other in found[1:])


FORMS = (WeightFormat(8), WeightFormat(4), WeightFormat(8, 32), WeightFormat(4, 96))
"""Groups of a part of a cache line of packed numbers, of several, and of a number of lines that is none."""


@pytest.mark.parametrize("shape", [*SHAPES, (12, 17000)])
@pytest.mark.parametrize("rows", [1, 3, 8, 9])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounded_columns_equal_those_written_out(step, shape, rows, form, threads):
    """Beside maps as stored and of another format, with masks of their own, whatever the number of threads."""
    d, width = shape
    x = drawn(rows, d).to(step.dtype)
    least = drawn(d, seed=2).abs().to(step.dtype)
    bias = drawn(width, seed=3).to(step.dtype)
    columns = drawn(d, width, seed=1)
    other = next(each for each in FORMS if each.bits != form.bits)
    maps = [
        rounded(columns, form, least, bias),
        stored(drawn(d, 5, seed=4).to(step.dtype), None),
        rounded(columns, other, least.clone(), None, corrected(width, 6)),
        rounded(columns + 1.0, form, None),
    ]
    for dense in (None, torch.arange(rows) % 3 == 1):
        found = []
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            found.append(step.products(KeptGroup(maps, step.dtype), x, dense))
        assert all(torch.equal(found[0], again) for again in found[1:])
        for part, given in zip(found[0].split([width, 5, width, width], 1), maps, strict=True):
            require_close(part, *exact(x, given, dense), d)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rounded_columns_of_dropped_channels_are_not_read(step, form):
    kept = rounded(drawn(64, 200), form, torch.tensor([0.0, torch.inf] * 32).to(step.dtype))
    x = drawn(1, 64).to(step.dtype)
    before = step.products(KeptGroup([kept], step.dtype), x)
    assert kept.weight.scales is not None
    kept.weight.scales[1::2] = torch.nan
    kept.weight.columns[1::2] = 255
    assert torch.equal(step.products(KeptGroup([kept], step.dtype), x), before)
    kept.weight.scales[0, -1] = torch.nan
    assert bool(step.products(KeptGroup([kept], step.dtype), x)[0, -1].isnan())


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", [(65, 33), (1, 1), (48, 97), (7, 4111)])
def test_rounded_columns_are_written_out_to_the_bit(step, form, shape):
    weight = rounded(drawn(*shape), form, None).weight
    assert weight.scales is not None
    weight.scales[0] = torch.tensor([6e-8, -3e-5])  # numbers below the normal ones of float16
    found = step.written_out(weight)
    assert found.dtype == step.dtype and torch.equal(found, weight.written_out().to(step.dtype))
    with pytest.raises(ValueError, match="weight: a rounded one needed"):
        step.written_out(ColumnWeight.as_stored(torch.ones(4, 4)))


@pytest.mark.parametrize("threshold", [1e-30, 1e-3, 0.5, 3.0, 1e30])
@pytest.mark.parametrize("rows", [1, 4])
def test_masks_are_those_of_the_scores_exactly(step, threshold, rows):
    """The weight is the identity, so an output is x where its channel is kept, and zero elsewhere."""
    d = 513
    make = torch.Generator().manual_seed(3)
    norms = (
        torch.rand(d, generator=make) * torch.tensor([1e-20, 1e-3, 1.0, 1e4])[torch.randint(0, 4, (d,), generator=make)]
    )
    norms[:4] = torch.tensor([0.0, torch.inf, torch.nan, 1e-42])
    least = cutoffs(norms, threshold, step.dtype)
    group = KeptGroup([stored(torch.eye(d).to(step.dtype), least)], step.dtype)
    whole = torch.int32 if step.dtype.itemsize == 4 else torch.int16
    near = [(least.view(whole) + by).view(step.dtype) for by in (-2, -1, 0, 1, 2)]
    for x in (*near, -near[2], drawn(d).to(step.dtype)):
        x = torch.where(x.isfinite(), x, 1.0)[None].repeat(rows, 1)
        x[0, 7] = torch.nan  # a NaN is dropped
        expected = torch.where(kept_channels(x, norms, threshold), x, 0.0)
        assert torch.equal(step.products(group, x), expected)
    flagged = step.products(group, x, torch.arange(rows) == 0)
    assert bool(flagged[0].isnan().all()) and torch.equal(flagged[1:], expected[1:])


def test_equal_masks_are_listed_once(step):
    columns, least = drawn(8, 4).to(step.dtype), drawn(8, seed=1).abs().to(step.dtype)
    given = (None, least, least.clone(), None, least + 1.0)
    group = KeptGroup([stored(columns, each) for each in given], step.dtype)
    assert [entry.list for entry in group.maps] == [0, 1, 1, 0, 4]


def test_views_and_rows_apart_are_taken(step):
    columns = drawn(40, 24, seed=1).to(step.dtype)
    group = KeptGroup([stored(columns, None)], step.dtype)
    wide = drawn(6, 80).to(step.dtype)
    x, dense = wide[::2, ::2], torch.tensor([True, False] * 3)[::2]
    assert torch.equal(step.products(group, x, dense), step.products(group, x.clone()))
    assert step.products(group, x[:0]).shape == (0, 24)


@pytest.mark.parametrize(("width", "gap"), [(2048, 64), (4096, 64), (1024, 0), (33, 0), (1, 0)])
def test_columns_are_never_a_multiple_of_4_kb_apart(step, width, gap):
    """Sizes are those of two-byte numbers."""
    width = max(1, width * 2 // step.dtype.itemsize)
    columns, x = drawn(40, width, seed=1).to(step.dtype), drawn(2, 40).to(step.dtype)
    found = spaced(columns)
    assert torch.equal(found, columns) and found.stride() == (width + gap // step.dtype.itemsize, 1)
    both = [step.products(KeptGroup([stored(each, None)], step.dtype), x) for each in (found, columns)]
    assert torch.equal(*both)


@pytest.mark.parametrize("shape", [(65, 33), (1, 1), (576, 97), (130, 4099)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
def test_a_dense_product_by_rows(step, shape, rows, threads):
    d, width = shape
    x, weight = drawn(rows, 2 * d)[:, ::2].to(step.dtype), drawn(width, d + 3, seed=1)[:, :d].to(step.dtype)
    apart = torch.empty(width, d + 3, dtype=step.dtype)[:, :d].copy_(weight)
    found = []
    for number in (1, 2, 3, 8):
        torch.set_num_threads(number)
        found.append(step.dense(x, weight.contiguous()))
    assert all(torch.equal(found[0], other) for other in (*found[1:], step.dense(x, apart)))
    require_close(found[0], x.double() @ weight.double().T, x.double().abs() @ weight.double().T.abs(), d)


def test_what_is_no_dense_product_is_refused(step):
    x, weight = torch.ones(2, 8, dtype=step.dtype), torch.ones(4, 8, dtype=step.dtype)
    for given in ((x, weight[:, :7]), (x.double(), weight), (x, weight.double()), (x, torch.ones(8, 4).t().to(x))):
        with pytest.raises(ValueError, match=r"x, weight: .* needed, got"):
            step.dense(*given)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of that kind")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["x86-64", "x86-64-v3"])
def test_older_processors(dtype, kind, monkeypatch, threads):
    """Without AVX-512, and without AVX: narrower vectors, and other code where vectors are narrowed and lists made."""
    flags = tuple(flag for flag in host_compiler._FLAGS if not flag.startswith("-march"))
    monkeypatch.setattr(host_compiler, "_FLAGS", (*flags, f"-march={kind}"))
    older = CompiledStep(dtype, None)
    assert older.lanes == {"x86-64": 4, "x86-64-v3": 8}[kind]
    for shape in ((65, 33), (576, 192), (30, 4111)):
        for rows in (1, 3, 9):
            for kept in ("some", "none", "all"):
                test_equals_the_masked_products_in_float64(older, shape, rows, kept)
            test_the_number_of_threads_changes_no_bit(older, shape, rows, None)
            test_a_dense_product_by_rows(older, shape, rows, None)
            test_rounded_columns_equal_those_written_out(older, shape, rows, FORMS[rows % 4], None)
        for form in FORMS:
            test_rounded_columns_are_written_out_to_the_bit(older, form, shape)
    for threshold in (1e-30, 0.5, 1e30):
        test_masks_are_those_of_the_scores_exactly(older, threshold, 1)
        test_masks_are_those_of_the_scores_exactly(older, threshold, 4)


def test_what_does_not_fit_is_refused(step):
    columns = drawn(8, 4).to(step.dtype)
    other = torch.float64
    for given, message in (
        ([stored(columns, None), stored(columns[:7], None)], "weight: .* with unit last stride needed"),
        ([stored(columns.t(), None)], r"weight: .* with strides \(1, 4\)"),
        ([stored(columns.to(other), None)], "weight: must have x's dtype .*, got torch.float64"),
        ([stored(columns, torch.ones(8, dtype=other))], r"cutoffs: contiguous .* \[8\] needed, got torch.float64"),
        ([stored(columns, None, torch.ones(5, dtype=step.dtype))], r"bias: contiguous .* \[4\] needed"),
        ([stored(columns, None, None, corrected(5, 0))], r"scale: contiguous float32 \[4\]"),
    ):
        with pytest.raises(ValueError, match=message):
            KeptGroup(given, step.dtype)
    with pytest.raises(ValueError, match=r"columns: .* on a CPU needed, got torch\.float64"):
        KeptGroup([stored(columns.to(other), None)], other)
    group = KeptGroup([stored(columns, None)], step.dtype)
    with pytest.raises(ValueError, match=r"x: .* \[B, 8\] needed, got"):
        step.products(group, torch.ones(2, 9, dtype=step.dtype))
    with pytest.raises(ValueError, match=r"x: .* needed, got torch.float64"):
        step.products(group, torch.ones(2, 8, dtype=other))
    with pytest.raises(ValueError, match=r"dense: bool \[2\] needed, got torch.bool \[3\]"):
        step.products(group, torch.ones(2, 8, dtype=step.dtype), torch.ones(3, dtype=torch.bool))


def test_it_runs_on_torchs_threads(step):
    symbol = openmp_runtime()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        lines = [line.split() for line in maps if line.rstrip().endswith(symbol.name)]
    spans = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    assert any(start <= step.openmp < end for start, end in spans)
