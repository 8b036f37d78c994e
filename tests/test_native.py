"""The native library's ops, each against its definition in float64, and what they refuse."""

from __future__ import annotations

import tempfile

import pytest
import torch

from compact_kernels import Ragged, answer_divergence, linear_logprob, native, reference
from compact_kernels.dispatch import native_applies, native_cuda_applies
from compact_kernels.head import native_rows
from compact_kernels.head.rows import product
from tests.head_cases import poison_fresh_memory, without_library
from tests.native_cases import NEEDS_LIBRARY, python

OPS = torch.ops.compact_native


# ---- ops on CPUs ------------------------------------------------------------------------------------------------


def statistics_arguments(dtype: torch.dtype, outer: float = 0.0, vocabulary: int = 5003) -> list[object]:
    """Rows with a confident token, an ignored one, forbidden tokens and answers of several lengths."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(7, vocabulary + 13, generator=generator)[:, :vocabulary] * 3
    targets = torch.randint(vocabulary, (7,), generator=generator)
    targets[3] = -100
    z[1, targets[1]] = 60.0
    z[2, :50] = -float("inf")
    targets[2] = 60
    ids = torch.tensor([5, 4000, 61])
    bias = torch.randn(vocabulary, generator=generator)
    table = torch.full((10, 9), float("nan"))
    offsets = [torch.tensor(cu, dtype=torch.int32) for cu in ([0, 2, 2, 3], [0, 3, 5, 9])]
    return [z.to(dtype), targets, bias, ids, *offsets, 0.7, outer, -100, table, 2, True]


@NEEDS_LIBRARY
@pytest.mark.parametrize("outer", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_statistics_are_those_of_its_softmax(dtype, outer):
    arguments = statistics_arguments(dtype, outer)
    z, targets, bias, ids, table = arguments[0], arguments[1], arguments[2], arguments[3], arguments[9]
    raw = (z.double() + bias.double()) * 0.7
    slope = 1 - raw.tanh().square() if outer else torch.ones_like(raw)
    logp = ((raw.tanh() * outer) if outer else raw).log_softmax(-1)
    native.run(OPS.row_statistics, *arguments)
    p, rows, counted = logp.exp(), torch.arange(7), targets != -100
    gradient = p.index_put((rows, targets.clamp_min(0)), p[rows, targets.clamp_min(0)] - 1)
    asked = [ids[:2]] + [ids[:0]] * 2 + [ids[2:]] * 4  # rows 2 … 8 of rationales [0, 3), [3, 5), [5, 9)
    evidence = torch.stack([logp[i, a].mean() if len(a) else logp.new_zeros(()) for i, a in enumerate(asked)])
    wanted = [
        logp[rows, targets.clamp_min(0)].where(counted, 0.0),
        torch.special.entr(p).sum(-1),
        evidence,
        gradient.norm(dim=-1).where(counted, 0.0),
    ]
    assert table[:, :2].isnan().all() and not table[:, 2:].isnan().any()
    for actual, truth in zip(table[:4, 2:].double(), wanted):
        torch.testing.assert_close(actual, truth, rtol=3e-6, atol=1e-6)
    stored = z.double() * table[5, 2:, None]
    rounding = 1e-6 if dtype == torch.float32 else 2**-8
    difference = (stored - gradient * slope)[counted].abs()
    assert bool((difference <= rounding * (gradient * slope)[counted].abs() + 1e-7).all())
    confident = table[:, 3].double()  # row 1: 1 − p without cancellation
    if not outer:
        others = p[1].index_fill(0, targets[1], 0.0).sum()
        torch.testing.assert_close(confident[4], others, rtol=1e-5, atol=0.0)
        torch.testing.assert_close(confident[0], -others, rtol=1e-5, atol=0.0)


@NEEDS_LIBRARY
@pytest.mark.parametrize(("asked", "found"), [("default", ("any",)), ("avx2", ("AVX2", "any"))])
def test_other_instructions_give_the_same(asked, found):
    code = """
import torch
from compact_kernels import native
from tests.test_native import statistics_arguments
arguments = statistics_arguments(torch.float32, 3.0)
native.run(torch.ops.compact_native.row_statistics, *arguments)
torch.save((torch.ops.compact_native.cpu_capability(), arguments[9], arguments[0]), "{path}")
"""
    arguments = statistics_arguments(torch.float32, 3.0)
    native.run(OPS.row_statistics, *arguments)
    with tempfile.NamedTemporaryFile() as file:
        result = python(code.replace("{path}", file.name), ATEN_CPU_CAPABILITY=asked)
        assert result.returncode == 0, result.stderr
        capability, table, z = torch.load(file.name, weights_only=True)
    assert capability in found
    torch.testing.assert_close(table, arguments[9], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(z, arguments[0], rtol=1e-5, atol=1e-6)


@NEEDS_LIBRARY
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_change_nothing(threads):
    before = torch.get_num_threads()
    expected = statistics_arguments(torch.float32)
    native.run(OPS.row_statistics, *expected)
    try:
        torch.set_num_threads(threads)
        arguments = statistics_arguments(torch.float32)
        native.run(OPS.row_statistics, *arguments)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(arguments[9][:, 2:], expected[9][:, 2:]) and torch.equal(arguments[0], expected[0])


@NEEDS_LIBRARY
@pytest.mark.parametrize("kind", ["kl", "jsd"])
@pytest.mark.parametrize(
    ("dtype", "held"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_the_divergence_and_its_gradient_err_at_most_twice_as_much_as_torch_itself(dtype, held, kind, monkeypatch):
    monkeypatch.setattr(native_rows, "buffer_dtype", lambda _: held)  # as on CPUs without and with such products
    spans = ((2, 2, 2), (3,), (2, 1, 2, 0), (0, 0), (1, 2, 2, 1))
    lengths = [length for question in spans for length in question]
    ragged = Ragged.build(
        sequence_lengths=[length + 3 for length in lengths],
        prompt_lengths=[1] * len(lengths),
        rationales_per_question=[len(question) for question in spans],
        answer_spans=[(1, length) for length in lengths],
    )
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(int(ragged.cu_seqlens[-1]), 9, generator=generator).to(dtype).double()
    weight = torch.randn(700, 9, generator=generator).to(dtype).double()
    bias = torch.randn(700, generator=generator).to(dtype).double()
    bias[:3] = -float("inf")  # forbidden to all
    alpha = torch.rand(len(lengths), generator=generator)
    alpha[1] = 0
    upstream = torch.rand(len(spans), generator=generator)
    results = []
    for function, precision in (
        (reference.answer_divergence, torch.float64), (reference.answer_divergence, dtype), (answer_divergence, dtype),
    ):  # fmt: skip
        leaves = [tensor.to(precision).detach().requires_grad_() for tensor in (hidden, weight, bias)]
        assert native_applies(leaves[0]) == (precision == dtype)
        value = function(*leaves[:2], ragged, alpha, kind=kind, bias=leaves[2])
        gradients = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
        results.append([tensor.detach().double() for tensor in (value, *gradients)])
    for name, truth, plain, ours in zip(("value", "hidden", "weight", "bias"), *results):
        allowed = 2 * (plain - truth).norm() + 1e-6 * truth.norm()
        assert (ours - truth).norm() <= allowed, f"{name}: {(ours - truth).norm():.3g}, allowed {allowed:.3g}"


@NEEDS_LIBRARY
def test_the_divergence_is_exact_where_one_rationale_has_nearly_all_of_alpha():
    ragged = Ragged.build(
        sequence_lengths=[5] * 3, prompt_lengths=[1] * 3, rationales_per_question=[3], answer_spans=[(1, 2)] * 3
    )
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(15, 16, generator=generator)
    weight = torch.randn(5000, 16, generator=generator)
    alpha = torch.tensor([1e-6, 1.0, 2e-6])
    results = []
    for dtype in (torch.float64, torch.float32):
        leaf = hidden.to(dtype).requires_grad_()
        value = answer_divergence(leaf, weight.to(dtype), ragged, alpha, kind="kl")
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
        results.append([value.detach().double(), *gradient.double().split(5)])
    for truth, actual in zip(*results):
        assert (actual - truth).norm() <= 2e-5 * truth.norm()


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("position", "value", "words"),
    [
        (1, torch.full((7,), 5003), r"targets\[0\] is 5003.*V = 5003"),
        (1, torch.zeros(6, dtype=torch.int64), "one a row"),
        (2, torch.zeros(5002), r"bias is float32, \(V,\)"),
        (3, torch.tensor([5, -1, 61]), r"answer_ids\[1\] is -1"),
        (4, torch.tensor([0, 2, 2, 9], dtype=torch.int32), r"cu_answers\[3\] is 9, not within 2 to 3"),
        (5, torch.tensor([0, 3, -5, 9], dtype=torch.int32), r"cu_rows\[2\] is -5"),
        (9, torch.zeros(10, 8), "room for 7 rows from 2 on"),
        (10, 2**63 - 2, "room for 7 rows"),
        (0, torch.zeros(7, 5003, dtype=torch.float64), "float32 or bfloat16"),
    ],
)
def test_what_would_touch_foreign_memory_is_refused(position, value, words):
    arguments = statistics_arguments(torch.float32)
    arguments[position] = value
    with pytest.raises(RuntimeError, match=f"row_statistics.*{words}"):
        native.run(OPS.row_statistics, *arguments)


@NEEDS_LIBRARY
@pytest.mark.parametrize(
    ("cu_questions", "cu_span", "first_row"),
    [
        ([0, 10**6, 2], [0, 2, 4], 0),
        ([-5, 2], [0, 2, 4], 0),
        ([0, 2, 4], [0, 10**6, 4 - 10**6, 3, 4], 0),
        ([0, 4], [0, 2, 1, 3, 5], 0),
        ([0, 2], [-8, -6, -4], -8),
        ([0, 2], [0, 2, 4], 1),
        ([0, 2], [0, 2, 4], 2**63 - 2),
    ],
)
def test_offsets_that_leave_the_rows_are_refused(cu_questions, cu_span, first_row):
    questions, span = (torch.tensor(offsets, dtype=torch.int32) for offsets in (cu_questions, cu_span))
    place = (torch.rand(len(cu_span) - 1), 0, len(cu_questions) - 1, first_row, False)
    with pytest.raises(RuntimeError, match="are not offsets|first_row is"):
        native.run(
            OPS.answer_divergence,
            *(torch.rand(4, 30), torch.ones(4), questions, span, *place, torch.zeros(2), torch.zeros(9), None),
        )


@NEEDS_LIBRARY
@pytest.mark.parametrize("outer", [0.0, 3.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_alone(value, outer):
    clean, poisoned = (statistics_arguments(torch.float32, outer) for _ in range(2))
    poisoned[2][7] = clean[2][7] = 0.0
    poisoned[0][4, 7] = value
    for arguments in (clean, poisoned):
        native.run(OPS.row_statistics, *arguments)
    others = torch.tensor([row for row in range(7) if row != 4])
    assert torch.equal(poisoned[9][:, 2:][:, others], clean[9][:, 2:][:, others])
    assert torch.equal(poisoned[0][others], clean[0][others])
    if value != value or not outer:  # a softcap makes an infinite logit finite
        assert poisoned[9][:4, 2 + 4].isnan().all()


@NEEDS_LIBRARY
def test_every_op_on_tensors_has_a_fake():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("compact_native::")]
    with_tensors = [name for name in names if "Tensor" in str(getattr(OPS, name.partition("::")[2]).default._schema)]
    assert len(with_tensors) == 5
    for name in with_tensors:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"), name


@NEEDS_LIBRARY
def test_the_ops_keep_what_torch_asks_of_ops():
    arguments = statistics_arguments(torch.float32, vocabulary=70)
    arguments[3] = torch.tensor([5, 40, 61])
    arguments[9] = torch.zeros(10, 9)
    torch.library.opcheck(OPS.row_statistics.default, arguments)
    rows = [torch.rand(7) for _ in range(4)]
    block = [torch.randn(7, 40), torch.randint(40, (7,)), None, 1.0, 0.0, *rows, 3]
    torch.library.opcheck(OPS.gradient_block.default, block)
    offsets = (torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2, 4], dtype=torch.int32))
    divergence = (torch.rand(4, 30), torch.ones(4), *offsets, torch.rand(2), 0, 1, 0, False, torch.zeros(1))
    torch.library.opcheck(OPS.answer_divergence.default, (*divergence, torch.zeros(4), None))


# ---- on a GPU: the rule's and the consensus' own tests are test_rule_triton.py and test_consensus.py -----------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_cuda_ops_keep_what_torch_asks_of_ops_and_run_in_graphs():
    from compact_kernels import native_cuda
    from tests.test_rule_triton import make

    if native.cuda_trouble(0):
        pytest.skip(native.cuda_trouble(0))
    ragged, tensors = make()
    assert native_cuda_applies(tensors["logprob"]) and not native_cuda_applies(tensors["logprob"].double())
    query, key = torch.randn(2, ragged.num_sequences, 3, 40, device="cuda")
    degree = torch.zeros(ragged.num_sequences, device="cuda")
    torch.library.opcheck(OPS.question_in_degree.default, (query, key, ragged.cu_questions, 0.1, 5, degree))
    expected = native_cuda.in_degree(query, key, ragged)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # not torch's default one
        other = native_cuda.in_degree(query, key, ragged)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = native_cuda.in_degree(query, key, ragged)
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(other, expected) and torch.equal(captured, expected)
    with pytest.raises(RuntimeError, match="on the device of the others"):
        native.run(OPS.question_in_degree, query, key, ragged.cu_questions.cpu(), 0.1, 5, degree)


# ---- what every CPU path has to bear ----------------------------------------------------------------------------


@pytest.mark.parametrize("library", [pytest.param("C++", marks=NEEDS_LIBRARY), "plain torch"])
@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_a_softcaps_slope_is_known_where_probabilities_are_0(library, kind, monkeypatch):
    if library == "plain torch":
        without_library(monkeypatch)
    ragged = Ragged.build(
        sequence_lengths=[5] * 3, prompt_lengths=[2] * 3, rationales_per_question=[3], answer_spans=[(1, 2)] * 3
    )
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 4, generator=generator) for n in (15, 100))
    alpha, gradients = torch.tensor([0.2, 0.3, 0.5]), []
    for function, dtype in ((reference.answer_divergence, torch.float64), (answer_divergence, torch.float32)):
        leaf = (100 * hidden).to(dtype).requires_grad_()
        value = function(leaf, weight.to(dtype), ragged, alpha.to(dtype), kind=kind, softcap=30.0, temperature=0.5)
        gradients.append(torch.autograd.grad(value.sum(), leaf)[0].double())
    truth, found = gradients
    assert (found - truth).norm() <= (0.2 if kind == "kl" else 1e-5) * truth.norm()  # kl: e⁻⁸⁷ is the least p


def test_no_rows_at_all_give_a_weight_no_gradient():
    """Where bfloat16 rows are held in float32, the weight's gradient is a product over rows that there are none of."""
    weight = torch.randn(300, 8).bfloat16()
    with pytest.MonkeyPatch.context() as patch:
        poison_fresh_memory(patch)
        assert bool((product(torch.zeros(300, 0), torch.zeros(0, 8).bfloat16()) == 0).all())
        leaf = weight.requires_grad_()
        logprob, _ = linear_logprob(torch.zeros(0, 8).bfloat16(), leaf, torch.zeros(0, dtype=torch.int64))
        logprob.sum().backward()
    assert bool((weight.grad == 0).all())
