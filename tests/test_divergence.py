"""Answer divergence in Triton: its rows against autograd in float64, the op against the plain one."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from compact_kernels import Ragged

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("triton_kernels")
VOCABULARY = 5003 if DEVICE == "cuda" else 133
# Span lengths of questions' rationales: one class, alone, a class and two others, none at all, two classes.
SPANS = ((2, 2, 2), (3,), (2, 1, 2, 0), (0, 0), (1, 2, 2, 1))


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small shapes go through many tiles and several programs a row, as large ones do."""
    from compact_kernels import divergence_triton

    monkeypatch.setattr(divergence_triton, "TILE", 256)
    monkeypatch.setattr(divergence_triton, "SPLITS", 2)


def make_ragged(spans: tuple[tuple[int, ...], ...] = SPANS, seed: int = 0) -> Ragged:
    """Rationales with the given answer spans, each somewhere inside a completion of some length."""
    rng = random.Random(seed)
    lengths = [length for question in spans for length in question]
    starts = [rng.randint(0, 3) for _ in lengths]
    prompts = [rng.randint(1, 3) for _ in lengths]
    completions = [start + length + rng.randint(1, 2) for start, length in zip(starts, lengths)]
    return Ragged.build(
        sequence_lengths=[p + c for p, c in zip(prompts, completions)],
        prompt_lengths=prompts,
        rationales_per_question=[len(question) for question in spans],
        answer_spans=list(zip(starts, lengths)),
    )


def divergence(logp: Tensor, ragged: Ragged, alpha: Tensor, kind: str) -> Tensor:
    """D_q from log-probabilities of the span rows (G, V): the definition, in loops."""
    cu_span, cu_questions = ragged.host.cu_span.tolist(), ragged.host.cu_questions.tolist()
    totals = []
    for first, last in zip(cu_questions[:-1], cu_questions[1:]):
        total = logp.new_zeros(()) + 0 * logp.where(logp > -1e30, 0.0).sum()
        for k in range(first, last):
            for i in range(first, last):
                p, q = logp[cu_span[k] : cu_span[k + 1]], logp[cu_span[i] : cu_span[i + 1]]
                if k == i or len(p) == 0 or len(p) != len(q):
                    continue
                if kind == "kl":
                    total = total + alpha[k] * alpha[i] * (p.exp() * (p - q)).sum(-1).mean()
                elif k < i:
                    middle = ((p.exp() + q.exp()) / 2).clamp_min(1e-300).log()
                    pair = (p.exp() * (p - middle) + q.exp() * (q - middle)).sum(-1).mean() / 2
                    total = total + alpha[k] * alpha[i] * pair
        totals.append(total)
    return torch.stack(totals)


class Rows:
    """Logits of every scored row, the buffer that holds them as E, and the truth of both in float64."""

    def __init__(self, kind: str, *, dtype: torch.dtype = torch.float32, forbidden: int = 0, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        host = make_ragged(seed=seed)
        logits = torch.randn(host.num_rows, VOCABULARY, generator=generator, dtype=torch.float64) * 2
        logits[:, :forbidden] = -1e30
        self.pivots = torch.randint(forbidden, VOCABULARY, (host.num_rows,), generator=generator)
        shift = logits.gather(1, self.pivots[:, None])
        e = (logits - shift).exp().to(dtype)  # the truth is that of the buffer, however coarse
        self.sums = e.double().sum(1)
        leaf = e.double().log().clamp_min(-1e30).requires_grad_()
        self.alpha = torch.rand(host.num_sequences, generator=generator)
        self.alpha[2] = 0
        logp = leaf.log_softmax(-1)
        self.value = divergence(logp[host.span_rows], host, self.alpha.double(), kind)
        self.owner = torch.repeat_interleave(torch.arange(host.num_sequences), host.cu_rows.diff())
        question = torch.repeat_interleave(torch.arange(host.num_questions), host.cu_questions.diff())
        upstream = torch.rand(host.num_questions, generator=generator, dtype=torch.float64)
        self.upstream = upstream[question].float()  # (S,)
        (self.gradient,) = torch.autograd.grad((self.value * upstream).sum(), leaf)
        self.e, self.kind, self.ragged = e, kind, host.to(DEVICE)

    def buffer(self, poison: bool = True) -> Tensor:
        """E with garbage where it must not be read: the pivot's column and the padding behind the vocabulary."""
        padded = torch.full((self.e.shape[0], VOCABULARY + 7), float("nan"), dtype=self.e.dtype)
        padded[:, :VOCABULARY] = self.e
        if poison:
            padded.scatter_(1, self.pivots[:, None], -3.0)
        return padded.to(DEVICE)[:, :VOCABULARY]

    def arguments(self, first: int = 0, last: int | None = None, first_row: int = 0) -> dict[str, Any]:
        return {
            "buffer": self.buffer()[first_row:],
            "sums": self.sums.float()[first_row:].to(DEVICE),
            "pivots": self.pivots[first_row:].to(DEVICE),
            "ragged": self.ragged,
            "alpha": self.alpha.to(DEVICE),
            "first_question": first,
            "last_question": self.ragged.num_questions if last is None else last,
            "first_row": first_row,
            "kind": self.kind,
        }

    def span(self) -> Tensor:
        """Which rows predict an answer, (N,) bool."""
        mask = torch.zeros(self.ragged.num_rows, dtype=torch.bool)
        mask[self.ragged.host.span_rows] = True
        return mask


def close(actual: Tensor, expected: Tensor, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(actual.detach().double().cpu(), expected.detach().double(), rtol=rtol, atol=atol)


KINDS = pytest.mark.parametrize("kind", ["kl", "jsd"])


@KINDS
@pytest.mark.parametrize("forbidden", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_value_of_a_buffer_is_that_of_its_probabilities(kind, forbidden, dtype):
    from compact_kernels.divergence_triton import span_divergence

    rows = Rows(kind, dtype=dtype, forbidden=forbidden)
    value, scores = span_divergence(**rows.arguments())
    close(value, rows.value)
    assert scores.isfinite().all()
    assert value.tolist()[1] == 0 and value.tolist()[3] == 0


@KINDS
@pytest.mark.parametrize("forbidden", [0, 9])
def test_the_gradient_is_added_to_the_answer_rows_and_to_no_others(kind, forbidden):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, forbidden=forbidden, seed=1)
    arguments = rows.arguments()
    scores = span_divergence(**arguments)[1]
    gain = rows.alpha * rows.upstream
    add_span_gradient_(**arguments, scores=scores, gain=gain.to(DEVICE))
    before, padding = rows.buffer().cpu(), arguments["buffer"].cpu()
    close(arguments["buffer"], before.double() + rows.gradient, rtol=1e-5, atol=1e-6)
    assert torch.equal(padding[~rows.span()], before[~rows.span()])


@KINDS
def test_the_gradient_over_alpha_is_finite_where_alpha_is_zero(kind):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, seed=2)
    near = Rows(kind, seed=2)
    near.alpha[2] = 1e-9
    logp = near.e.double().log().log_softmax(-1).requires_grad_()
    host = rows.ragged.host
    total = divergence(logp.log_softmax(-1)[host.span_rows], host, near.alpha.double(), kind).sum()
    wanted = torch.autograd.grad(total, logp)[0] / near.alpha.double()[rows.owner][:, None]
    arguments = rows.arguments()
    scores = span_divergence(**arguments)[1]
    ones = torch.ones_like(rows.alpha)
    add_span_gradient_(**arguments, scores=scores, gain=ones.to(DEVICE), replace=True)
    close(arguments["buffer"].cpu()[rows.span()], wanted[rows.span()])


@KINDS
def test_rows_may_be_replaced_scaled_and_led_through_a_softcap(kind):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, seed=3)
    gain, shift = rows.alpha * rows.upstream, torch.linspace(-2, 2, len(rows.e))
    arguments = rows.arguments()
    scores = span_divergence(**arguments)[1]
    options: dict[str, Any] = {"softcap": 30.0, "temperature": 1.5, "shift": shift.to(DEVICE), "times_sum": True}
    add_span_gradient_(**arguments, scores=scores, gain=gain.to(DEVICE), replace=True, **options)
    z = rows.e.double().log() + shift.double()[:, None]
    wanted = rows.gradient * rows.sums[:, None] * (1 - (z * 1.5 / 30).square())
    span = rows.span()
    close(arguments["buffer"].cpu()[span], wanted[span], atol=1e-6 * float(wanted.abs().max()) + 1e-6)


@KINDS
def test_questions_may_come_in_chunks_and_buffers_start_anywhere(kind):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, seed=4)
    out = (
        torch.full((5,), float("nan"), device=DEVICE),
        torch.full((len(rows.ragged.span_rows),), float("nan"), device=DEVICE),
    )
    gain = (rows.alpha * rows.upstream).to(DEVICE)
    cu_rows = rows.ragged.host.cu_rows.tolist()
    cu_questions = rows.ragged.host.cu_questions.tolist()
    for first, last in ((0, 2), (2, 4), (4, 5), (5, 5)):
        first_row = cu_rows[cu_questions[first]]
        arguments = rows.arguments(first, last, first_row)
        assert out[0][first:last].isnan().all()
        span_divergence(**arguments, out=out)
        add_span_gradient_(**arguments, scores=out[1], gain=gain)
        end = cu_rows[cu_questions[last]] - first_row
        before = rows.buffer().cpu()[first_row:].double()
        close(arguments["buffer"][:end], before[:end] + rows.gradient[first_row : first_row + end])
        assert torch.equal(arguments["buffer"][end:].cpu().double(), before[end:])
    close(out[0], rows.value)
    assert out[1].isfinite().all()


@KINDS
def test_a_buffer_may_hold_the_answer_rows_alone(kind):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, seed=5)
    host = rows.ragged.host
    first = int(host.cu_span[int(host.cu_questions[2])])
    chosen = host.span_rows[first:]
    buffer = rows.buffer(poison=False)[chosen.to(DEVICE)].contiguous()
    sums = rows.sums.float()[chosen].to(DEVICE)
    arguments = rows.arguments(2, 5) | {"buffer": buffer, "sums": sums, "pivots": None, "first_row": first}
    value, scores = span_divergence(**arguments, gathered=True)
    close(value[2:], rows.value[2:])
    gain = (rows.alpha * rows.upstream).to(DEVICE)
    add_span_gradient_(**arguments, scores=scores, gain=gain, gathered=True, replace=True)
    close(buffer, rows.gradient[chosen])


@KINDS
def test_the_pivot_may_hold_another_mass_than_one(kind):
    from compact_kernels.divergence_triton import add_span_gradient_, span_divergence

    rows = Rows(kind, seed=7)
    arguments = rows.arguments()
    scale = torch.linspace(0.25, 3, len(rows.e), device=DEVICE)  # a row with another shift
    arguments["buffer"] *= scale[:, None]
    arguments["sums"] *= scale
    value, scores = span_divergence(**arguments, masses=scale)
    close(value, rows.value)
    gain = (rows.alpha * rows.upstream).to(DEVICE)
    add_span_gradient_(**arguments, masses=scale, scores=scores, gain=gain, replace=True)
    close(arguments["buffer"].cpu()[rows.span()], rows.gradient[rows.span()])


@KINDS
def test_two_runs_agree_to_the_last_bit(kind):
    from compact_kernels.divergence_triton import span_divergence

    rows = Rows(kind, seed=6)
    for one, other in zip(span_divergence(**rows.arguments()), span_divergence(**rows.arguments())):
        assert torch.equal(one, other)


# ---- the op ---------------------------------------------------------------------------------------------------


def problem(kind: str = "plain", dtype: torch.dtype = torch.float32, width: int = 16) -> dict[str, Any]:
    """Arguments of the op on the device; `kind` says what logits go through."""
    generator = torch.Generator().manual_seed(width)
    ragged = make_ragged(seed=8)
    options: dict[str, Any] = {}
    if kind != "plain":
        options["bias"] = torch.randn(VOCABULARY, generator=generator)
        options["bias"][:3] = -float("inf")  # forbidden tokens
    if kind == "capped":
        options |= {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.6}
        options["bias"][:3] = 0
    tensors = {
        "hidden": torch.randn(int(ragged.cu_seqlens[-1]), width, generator=generator),
        "head_weight": torch.randn(VOCABULARY, width, generator=generator) * 0.7,
        "alpha": torch.rand(ragged.num_sequences, generator=generator),
    } | {name: value for name, value in options.items() if name == "bias"}
    tensors["alpha"][2] = 0
    tensors = {name: t.to(DEVICE, torch.float32 if name == "alpha" else dtype) for name, t in tensors.items()}
    return options | tensors | {"ragged": ragged.to(DEVICE)}


def derive(function: Any, arguments: dict[str, Any], dtype: torch.dtype | None = None) -> list[Tensor]:
    """Value and gradients by hidden, head and bias, in float64 for comparison; computed in `dtype` if given."""
    arguments = dict(arguments)
    names = [name for name in ("hidden", "head_weight", "bias") if name in arguments]
    for name in (*names, "alpha"):
        tensor = arguments[name] if dtype is None else arguments[name].to(dtype)
        arguments[name] = tensor.detach().requires_grad_()
    value = function(**arguments)
    upstream = torch.linspace(0.5, 1.5, len(value), device=DEVICE, dtype=value.dtype)
    (value * upstream).sum().backward()
    assert arguments["alpha"].grad is None
    return [value.detach().double(), *(arguments[name].grad.double() for name in names)]


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("logits", ["plain", "bias", "capped"])
def test_the_op_errs_at_most_twice_as_much_as_torch_itself(kind, logits, dtype):
    from compact_kernels import reference
    from compact_kernels.divergence import answer_divergence

    arguments = problem(logits, dtype) | {"kind": kind}
    truth = derive(reference.answer_divergence, arguments, torch.float64)
    torch_own = derive(reference.answer_divergence, arguments)
    ours = derive(answer_divergence, arguments)
    # Triton's interpreter cuts a float32 off to bfloat16; a GPU rounds it.
    times = 4 if dtype == torch.bfloat16 and DEVICE == "cpu" else 2
    for name, exact, plain, fused in zip(("value", "hidden", "weight", "bias"), truth, torch_own, ours):
        allowed = times * (plain - exact).norm() + 1e-6 * exact.norm()
        assert float((fused - exact).norm()) <= float(allowed), (name, (plain - exact).norm() / exact.norm())


@KINDS
def test_chunks_of_questions_change_nothing(kind, monkeypatch):
    from compact_kernels import divergence

    arguments = problem("bias") | {"kind": kind}
    whole = derive(divergence.answer_divergence, arguments)
    chunked = derive(divergence.answer_divergence, arguments | {"workspace_mib": 0})
    for one, other in zip(whole, chunked):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_chunk_holds_what_fits_and_at_least_a_question():
    from compact_kernels.divergence import span_chunks

    ragged = make_ragged()  # span rows: 6, 3, 5, 0, 6
    mib = 4 * (1 << 18) // 4  # a vocabulary of which one row in float32 takes 1 MiB
    assert span_chunks(ragged, mib, 9) == ((0, 2, 0, 9), (2, 4, 9, 14), (4, 5, 14, 20))
    assert span_chunks(ragged, mib, 0) == (
        (0, 1, 0, 6),
        (1, 2, 6, 9),
        (2, 3, 9, 14),
        (3, 4, 14, 14),
        (4, 5, 14, 20),
    )
    assert span_chunks(ragged, mib, 99) == ((0, 5, 0, 20),)


@pytest.mark.parametrize("spans", [(), ((3,), (2,)), ((0, 0), (0,)), ((1, 2, 3),)])
def test_without_a_pair_the_divergence_is_a_connected_zero(spans):
    from compact_kernels.divergence import answer_divergence

    ragged = make_ragged(spans)
    hidden = torch.randn(int(ragged.cu_seqlens[-1]), 8, device=DEVICE, requires_grad=True)
    weight = torch.randn(VOCABULARY, 8, device=DEVICE, requires_grad=True)
    value = answer_divergence(hidden, weight, ragged.to(DEVICE), torch.ones(ragged.num_sequences, device=DEVICE))
    assert value.tolist() == [0.0] * len(spans)
    for gradient in torch.autograd.grad(value.sum(), [hidden, weight]):
        assert not gradient.any()


def test_only_what_requires_a_gradient_gets_one_and_the_graph_may_be_kept():
    from compact_kernels.divergence import answer_divergence

    arguments = problem("bias")
    hidden = arguments["hidden"].requires_grad_()
    total = answer_divergence(**arguments).sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(total, hidden)[0])
    arguments["hidden"], weight = hidden.detach(), arguments["head_weight"].requires_grad_()
    answer_divergence(**arguments).sum().backward()
    assert weight.grad is not None and weight.grad.any()


def test_a_second_derivative_is_refused():
    from compact_kernels.divergence import answer_divergence

    arguments = problem()
    hidden = arguments["hidden"].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(answer_divergence(**arguments).sum(), hidden, create_graph=True)


def test_autocast_decides_the_dtype_of_the_products():
    from compact_kernels.divergence import answer_divergence

    arguments = problem()
    half = {name: t.bfloat16() if name in ("hidden", "head_weight") else t for name, t in arguments.items()}
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        value = answer_divergence(**arguments)
    assert torch.equal(value, answer_divergence(**half))


def test_double_precision_is_left_to_plain_torch():
    from compact_kernels import reference
    from compact_kernels.divergence import answer_divergence

    arguments: dict[str, Any] = {
        name: value.double() if isinstance(value, Tensor) else value for name, value in problem("capped").items()
    }
    torch.testing.assert_close(
        answer_divergence(**arguments), reference.answer_divergence(**arguments), rtol=1e-12, atol=1e-14
    )
