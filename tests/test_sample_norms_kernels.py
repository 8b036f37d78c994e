"""The kernels of per-rationale norms against their plain definitions in float64, on the same numbers."""

from __future__ import annotations

import pytest
import torch

from compact_kernels.sample_norms import ops, plain
from compact_kernels.sample_norms.segments import SLICE, Segments

launch = pytest.importorskip("compact_kernels.sample_norms.launch", reason="needs Triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
SHORT, LONG = (1, 31, 33, 5, 64), (1, 127, 129, 1000, 1030, 31)
LENGTHS = [SHORT, (7,), LONG] if ON_GPU else [SHORT, (7,)]
DTYPES = [torch.float32, torch.bfloat16]
# fp32: of three tf32 products; bf16: of float32 sums over exact products
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-4}


def segments(lengths) -> Segments:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    return Segments.of(offsets.int().to(DEVICE), offsets.tolist())


def matrix(rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(DEVICE, dtype)


def by_rationale(parts: torch.Tensor, cut: Segments) -> torch.Tensor:
    return plain.segment_sum(parts, cut.cu_tiles)


def wide(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize(
    ("widths", "biased"), [((40,), 0), ((40,), 1), ((24, 40), 1), ((8, 24, 40), 2), ((33, 7, 5), 3)]
)
def test_gram_norms(lengths, widths, biased, dtype):
    cut = segments(lengths)
    x = matrix(cut.tokens, 48, dtype)
    grads = [matrix(cut.tokens, width, dtype, 1 + i) for i, width in enumerate(widths)]
    factor = torch.rand(cut.tokens, device=DEVICE)
    for given in (None, factor):
        found = launch.gram_norms(x, grads, biased, cut.cu, cut.tiles, given)
        truth = plain.gram_norms(x.double(), wide(*grads), biased, cut.cu, cut.tiles, *wide(given))
        torch.testing.assert_close(
            by_rationale(found, cut).double(), by_rationale(truth, cut), rtol=TOLERANCE[dtype], atol=0
        )


class Kernel:
    """One that gives away what it compiled, as Triton's do, and counts how often it was asked to."""

    def __init__(self, kernel) -> None:
        self.kernel, self.bound = kernel, 0

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.bound += 1
            self.kernel[grid](*arguments, **options)
            return self.kernel

        return launch


def test_a_launch_is_bound_once_for_all_that_triton_compiles_alike(monkeypatch):
    kernel = Kernel(launch.kernels.gram_kernel)
    monkeypatch.setattr(launch.kernels, "gram_kernel", kernel)
    monkeypatch.setattr(launch, "_KEPT", True)
    monkeypatch.setattr(launch, "_compiled", {})
    cut, longer = segments((5, 33)), segments((7, 40, 2))
    odd = torch.cat([cut.cu[:1], cut.cu])[1:]  # not aligned to 16 bytes
    for bound, cu, batch, width, dtype in (
        (1, cut.cu, cut, 40, torch.float32), (1, cut.cu, cut, 40, torch.float32),
        (1, longer.cu, longer, 40, torch.float32), (2, odd, cut, 40, torch.float32),
        (3, cut.cu, cut, 24, torch.float32), (4, cut.cu, cut, 40, torch.bfloat16),
    ):  # fmt: skip
        x, g = matrix(batch.tokens, 48, dtype, bound), matrix(batch.tokens, width, dtype, bound + 1)
        found = launch.gram_norms(x, [g], 1, cu, batch.tiles)
        truth = plain.gram_norms(x.double(), [g.double()], 1, cu, batch.tiles)
        torch.testing.assert_close(
            by_rationale(found, batch).double(), by_rationale(truth, batch), rtol=TOLERANCE[dtype], atol=0
        )
        assert kernel.bound == bound


def test_no_more_launches_are_kept_than_it_says(monkeypatch):
    kernel = Kernel(launch.kernels.scale_kernel)
    monkeypatch.setattr(launch.kernels, "scale_kernel", kernel)
    monkeypatch.setattr(launch, "_KEPT", True)
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(launch, "MOST_KEPT", 2)
    for tokens in (3, 4, 5, 6, 6):  # heads before tokens: a stride goes with their number
        cut = segments((tokens,))
        x, g = (matrix(2 * tokens, 8, torch.float32, seed).view(2, tokens, 8).transpose(0, 1) for seed in (0, 1))
        found = launch.scale_gradients(x, g, cut.cu, 1, "ones", 0.0)
        torch.testing.assert_close(found[0, 0], g.sum((0, 1)))
        assert len(launch._compiled) <= 2
    assert kernel.bound == 4


@pytest.mark.parametrize("rest", [0.3, 0.03, 0.004])
def test_gram_norms_of_cancelling_tokens_err_by_what_was_summed(rest, record_property):
    """A Gram matrix adds large terms to a small norm; the error is of the terms' size, float32's rounding of them."""
    cut = segments((64, 40))
    x, g = matrix(104, 48, torch.float32), matrix(104, 40, torch.float32, 1)
    x[32:64], g[32:64] = x[:32], -(1 - rest) * g[:32]  # the first rationale takes back nearly all it says
    x, g = x.bfloat16(), g.bfloat16()
    found = by_rationale(launch.gram_norms(x, [g], 0, cut.cu, cut.tiles, None), cut).double()
    truth = by_rationale(plain.gram_norms(x.double(), [g.double()], 0, cut.cu, cut.tiles), cut)
    pairs = zip(x.double().split([64, 40]), g.double().split([64, 40]))
    summed = torch.stack([((a @ a.T) * (b @ b.T)).abs().sum() for a, b in pairs])
    error = (found - truth).abs()
    assert error[1] < TOLERANCE[torch.bfloat16] * truth[1]
    assert (error < 1e-6 * summed).all()
    said = f"sums {summed[0] / truth[0]:.1e} times what is left, error {error[0] / truth[0]:.1e}"
    record_property("cancelling", said)
    print(f"gram kernel, cancelling: {said}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_biass_norm_alone_and_a_neighbours_nan(dtype):
    cut = segments(SHORT)
    g = matrix(cut.tokens, 40, dtype)
    found = launch.gram_norms(None, [g], 0, cut.cu, cut.tiles)
    truth = plain.gram_norms(None, [g.double()], 1, cut.cu, cut.tiles)
    torch.testing.assert_close(
        by_rationale(found, cut).double(), by_rationale(truth, cut), rtol=10 * TOLERANCE[dtype], atol=1e-3
    )
    g[:1] = float("nan")
    x = matrix(cut.tokens, 16, dtype)
    for norms in (
        by_rationale(launch.gram_norms(x, [g], 1, cut.cu, cut.tiles), cut),
        launch.product(g, x, cut.cu, None, None)[1].sum(0),
        launch.product(g, x, cut.cu, None, cut.offsets)[1].sum(0),
    ):
        assert norms.isnan().tolist() == [True, False, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_token_norms(lengths, dtype):
    cut = segments(lengths)
    g = matrix(cut.tokens, 48, dtype)
    ids = torch.randint(5, (cut.tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for ignored in (-1, 3):
        found = launch.token_norms(ids, g, cut.cu, cut.tiles, ignored)
        truth = plain.token_norms(ids, g.double(), cut.cu, cut.tiles, ignored)
        torch.testing.assert_close(
            by_rationale(found, cut).double(), by_rationale(truth, cut), rtol=TOLERANCE[dtype], atol=1e-30
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("shape", [(70, 4), (4, 70), (65, 33)])
@pytest.mark.parametrize("stored", [False, True])
def test_products(stored, lengths, shape, dtype):
    cut = segments(lengths)
    offsets = cut.offsets if stored else None
    a, b = matrix(cut.tokens, shape[0], dtype), matrix(cut.tokens, shape[1], dtype, 1)
    weights = torch.rand(cut.count, device=DEVICE)
    for given in (None, weights):
        total, norms = launch.product(a, b, cut.cu, given, offsets)
        true_total, true_norms = plain.product(a.double(), b.double(), cut.cu, *wide(given), None)
        torch.testing.assert_close(norms.double().sum(0), true_norms.sum(0), rtol=TOLERANCE[dtype], atol=0)
        scale = true_total.abs().max().item()
        torch.testing.assert_close(
            total.double().sum(0), true_total[0], rtol=0, atol=scale * (1e-5 if total.dtype == torch.float32 else 1e-2)
        )
    again = launch.product(a, b, cut.cu, weights, offsets)
    assert torch.equal(again[0], total) and torch.equal(again[1], norms)
    if shape[1] <= 16:
        found, truth = launch.column_norms(a, b, cut.cu), plain.column_norms(a.double(), b.double(), cut.cu)
        torch.testing.assert_close(found.double(), truth, rtol=TOLERANCE[dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("stored", [False, True])
def test_a_graphs_product_has_the_shapes_and_dtypes_it_was_told(triton_kernels, stored, dtype):
    cut = segments((7, 5))
    a, b = matrix(cut.tokens, 33, dtype), matrix(cut.tokens, 40, dtype, 1)
    op = torch.ops.compact_kernels.sample_product.default
    arguments = a, b, cut.cu, None, cut.offsets if stored else None
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_stored_products_of_empty_rationales_and_of_strided_and_expanded_rows(triton_kernels, dtype):
    cut = segments((3, 0, 0, 33, 33, 5))
    weights = torch.rand(cut.count, device=DEVICE)
    norms_dtype = torch.promote_types(dtype, torch.float32)
    wider, columns = matrix(cut.tokens, 90, dtype), matrix(40, cut.tokens, dtype, 1)
    for a, b in (
        (wider[:, 7:72], columns.t()),
        (wider[:, ::3], wider[:, 1::3]),
        (wider[:1, :65].expand(cut.tokens, -1), columns.t()),
        (wider[:, :65], columns.t()[:1].expand(cut.tokens, -1)),
    ):
        total, norms = ops.product(a, b, cut.cu, weights.to(norms_dtype), cut.offsets)
        true_total, true_norms = plain.product(a.double(), b.double(), cut.cu, weights.double(), None)
        torch.testing.assert_close(norms.double().sum(0), true_norms[0], rtol=TOLERANCE.get(dtype, 1e-12), atol=0)
        assert norms.sum(0)[1:3].eq(0).all()
        # One rounding, to nearest; the interpreter's is towards 0.
        close = {torch.float32: 1e-5, torch.bfloat16: 2**-8 if ON_GPU else 2**-7, torch.float64: 1e-12}[dtype]
        largest = true_total.abs().max().item()
        torch.testing.assert_close(total.double(), true_total, rtol=close, atol=largest * 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["rms", "layer", "ones", "given"])
def test_scale_gradients(kind, dtype):
    cut = segments(SHORT)
    slices = -(-cut.longest // SLICE)
    for heads, width in ((1, 48), (3, 20), (1, 300), (1, 4100)):
        x = matrix(cut.tokens * heads, width, dtype).view(cut.tokens, heads, width)
        g = matrix(cut.tokens * heads, width, dtype, 1).view(heads, cut.tokens, width).transpose(0, 1)
        found = launch.scale_gradients(x, g, cut.cu, slices, kind, 1e-6).sum(1)
        truth = plain.scale_gradients(x.double(), g.double(), cut.cu, slices, kind, 1e-6).sum(1)
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_token_rows(dtype):
    rows, cut = segments((1, 20, 9)), segments((4, 40, 12))
    g, h = matrix(rows.tokens, 30, dtype), matrix(rows.tokens, 40, dtype, 1)
    ids = torch.randint(50, (cut.tokens,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    factor = torch.rand(rows.tokens, device=DEVICE)
    for given in (None, factor):
        found = launch.token_rows(g, given, h, rows.cu, ids, cut.cu, 7, cut.longest)
        truth = plain.token_rows(g.double(), *wide(given), h.double(), rows.cu, ids, cut.cu, 7, cut.longest)
        torch.testing.assert_close(found.double(), truth, rtol=0, atol=truth.abs().max().item() * 1e-2)
        outside = (ids < 7) | (ids >= 37)
        assert not found[outside].any()
