"""The fused head at the edges: odd shapes and layouts, extreme logits, forbidden tokens, batches without targets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from compact_kernels import (
    Ragged,
    Statistics,
    answer_divergence,
    arguments,
    compatibility_loss,
    linear_logprob,
)
from compact_kernels.head import rows as rows_of_heads
from tests.head_cases import (
    CUDA,
    DEVICE,
    GRADIENTS,
    LARGEST_QUESTION,
    LAYOUT,
    LONG,
    Problem,
    assert_as_good_as_torch,
    choose_backend,
    errors,
    everything,
    identity_problem,
    leaves,
    limit_rows,
    logprob_gradients,
    logprob_of,
    make_problem,
    make_ragged,
    on_device,
    poison_fresh_memory,
)

INF = math.inf


@pytest.fixture(params=["triton", "native", "torch"])
def backend(request) -> str:
    return choose_backend(request)


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    poison_fresh_memory(monkeypatch)


def weighted(problem: Problem, **options: Any) -> dict[str, Tensor]:
    """The loss with given weights, which no statistic can spoil."""
    weights = torch.linspace(0.4, 1.1, problem.ragged.num_sequences, device=DEVICE)
    return everything(problem, weights=weights, consensus=None, **options)


# ---- shapes and layouts -----------------------------------------------------------------------------------------


SIZES = [(1, 7), (2, 9), (31, 33), (257, 130), (1000, 7)]


@pytest.mark.parametrize(
    ("vocabulary", "width", "dtype"),
    [(*size, torch.float32) for size in SIZES] + [(31, 7, torch.bfloat16), (257, 33, torch.bfloat16)],
)
def test_any_vocabulary_and_any_width(vocabulary, width, dtype, backend):
    layout = LAYOUT[1:] if dtype == torch.float32 else None  # a norm over few numbers says little in bfloat16
    problem = make_problem("bias", vocabulary, width, layout=layout)
    assert_as_good_as_torch(everything, problem, dtype, divergence_weight=0.3)
    assert_as_good_as_torch(logprob_gradients, problem, dtype)


@pytest.mark.skipif(CUDA, reason="a GPU's product rounds the weights of rows")
def test_a_bias_gets_the_rows_by_weights_that_are_not_rounded(backend, monkeypatch):
    monkeypatch.setattr(rows_of_heads, "CONVERTED", 2 * 301)  # two rows at a time, in the end one
    logits = torch.randn(301, generator=torch.Generator().manual_seed(5)).bfloat16().repeat(5, 1)
    problem = identity_problem(logits, torch.zeros(5, dtype=torch.int64))
    problem = replace(problem, bias=torch.zeros(301)).to(torch.bfloat16)
    for weight in torch.linspace(0.4, 1.1, 8):
        options = {"wants": "hb", "weights": weight[None], "consensus": None}
        truth = everything(problem.to(torch.float64), implementation="reference", **options)["dbias"]
        ratio = everything(problem, **options)["dbias"].double() / truth
        # What columns round alone averages out; a row's rounded weight would be off by up to 2^-8 in all of them.
        assert abs(float(ratio[1:].mean()) - 1) < 2**-11, float(weight)


@pytest.mark.parametrize("rows", [127, 128, 129, 1000] if CUDA else [31, 32, 33, 65])
def test_any_number_of_rows(rows, backend):
    ragged = make_ragged((((rows, 0),),), 40)
    total = int(ragged.cu_seqlens[-1])
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (total, 40))
    targets = torch.randint(40, (total,), generator=generator)
    problem = on_device(Problem(hidden, weight, targets, ragged, torch.zeros(1)))
    assert_as_good_as_torch(everything, problem, torch.float32)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor, torch.full_like(tensor, math.nan)], -1)[..., 0]


def padded(tensor: Tensor) -> Tensor:
    return torch.cat([tensor, torch.full_like(tensor, math.nan)], -1)[:, : tensor.shape[1]]


def misaligned(tensor: Tensor) -> Tensor:
    flat = torch.cat([torch.full_like(tensor[:1, :1], math.nan).flatten(), tensor.flatten()])
    return flat[1:].view(tensor.shape)


@pytest.mark.parametrize(("which", "wants"), [("hidden", "hw"), ("hidden", "h"), ("weight", "hw")])
@pytest.mark.parametrize("layout", [transposed, strided, padded, misaligned])
def test_any_layout_in_memory(layout, which, wants, backend):
    ragged = Ragged.build(sequence_lengths=[9, 2], prompt_lengths=[1, 1], rationales_per_question=[1, 1])
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (11, 50))
    targets = torch.randint(50, (11,), generator=generator)
    problem = on_device(Problem(hidden, weight, targets, ragged, torch.zeros(2))).to(torch.float32)
    for run in (weighted, logprob_gradients):
        plain = run(problem, wants=wants)
        moved = run(replace(problem, **{which: layout(getattr(problem, which))}), wants=wants)
        for name, error in errors(moved, plain).items():
            assert error <= 1e-6 * float(plain[name].norm()), name


@pytest.mark.parametrize("layout", [transposed, strided])
def test_any_layout_where_every_token_is_scored(layout, backend):
    # As nothing but a hand-made batch can: every position is a row, and the rows are not gathered.
    count = 11
    host = Ragged.build(sequence_lengths=[count + 1], prompt_lengths=[1], rationales_per_question=[1])
    host = replace(host, cu_seqlens=torch.tensor([0, count], dtype=torch.int32))
    generator = torch.Generator().manual_seed(4)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=torch.float64) for n in (count, 50))
    targets = torch.randint(50, (count,), generator=generator)
    problem = on_device(Problem(hidden, weight, targets, host, torch.zeros(1))).to(torch.float32)
    for wants in ("hw", "h"):
        plain = everything(problem, wants=wants)
        moved = everything(replace(problem, hidden=layout(problem.hidden)), wants=wants)
        for name, error in errors(moved, plain).items():
            assert error <= 1e-6 * float(plain[name].norm()), (name, wants)


# ---- extreme logits ---------------------------------------------------------------------------------------------


def confident(columns: int = 40) -> Problem:
    """Targets 15 to 35 nats above the others, whose own logits are random: 1 − p from 1e-5 to 1e-14."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, columns, generator=generator)
    targets = torch.randint(columns, (9,), generator=generator)
    logits.scatter_(1, targets[:, None], torch.linspace(15, 35, 9)[:, None].round(decimals=1))
    return identity_problem(logits.bfloat16(), targets, layout=[4, 5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wants", ["h", "hw"], ids=["frozen", "trained"])
@pytest.mark.parametrize("rule", ["given", "any_rule"])
def test_a_confident_token_keeps_its_relative_precision(rule, wants, dtype, backend):
    problem, count = confident().to(dtype), 9
    rows = problem.ragged.rows
    logits, targets = problem.hidden[rows].double(), problem.targets[rows][:, None]
    # By hand, for float64's own log-softmax cancels here.
    against = (logits - logits.gather(1, targets)).exp().scatter(1, targets, 0.0)  # p_v / p_target
    mass = against.sum(1, keepdim=True)
    gradient = (against / (1 + mass)).scatter(1, targets, -mass / (1 + mass))
    assert float(mass.max()) < 1e-4 and float(mass.min()) < 1e-13

    ones = torch.ones(2, device=DEVICE)
    decided: dict[str, Any] = {"weights": ones} if rule == "given" else {"rule": lambda _: ones}
    ours = everything(problem, wants=wants, sft_reduction="sum", normalizer=1.0, **decided)

    def assert_close(actual: Tensor, exact: Tensor, allowed: float) -> None:
        # Differences of up to 35 are rounded at 35·2^-24: 2e-6 relative in their exponential.
        assert float(((actual.double() - exact).norm(dim=1) / exact.norm(dim=1)).max()) <= allowed

    assert len(rows) == count
    assert_close(ours["logprob"][:, None], -mass.log1p(), 1e-5)
    assert_close(ours["grad_norm"][:, None], gradient.norm(dim=1, keepdim=True), 1e-5)
    # The identity hands the logits' gradient to the hidden states, the target's entry too: rounded twice in bfloat16.
    allowed = 1e-5 if dtype == torch.float32 else 2**-7
    assert_close(ours["dhidden"][rows], gradient, allowed)
    assert_close(ours["dhidden"][rows].gather(1, targets), gradient.gather(1, targets), allowed)


def improbable(nll: tuple[float, ...], columns: int = 90) -> Problem:
    """Rows whose target is so far below a random distribution of the others."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(nll), columns, generator=generator)
    targets = torch.randint(columns, (len(nll),), generator=generator)
    logits.scatter_(1, targets[:, None], -torch.tensor(nll)[:, None])
    return identity_problem(logits, targets, layout=[len(nll) - 2, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "nll",
    [
        (1.0,) * 8 + (70.0,) + (2.0,) * 3,
        (39.0, 41.0, 43.0, 45.0, 60.0, 88.0, 100.0, 1.0),
        (64.0, 100.0, 200.0, 1000.0, 2500.0, 6000.0),
    ],
    ids=["one_row", "around_the_limit", "every_row"],
)
def test_a_target_may_be_as_improbable_as_it_likes(nll, dtype, backend):
    problem = improbable(nll)
    for wants in ("hw", "h"):
        assert_as_good_as_torch(weighted, problem, dtype, wants=wants)
    assert_as_good_as_torch(logprob_gradients, problem, dtype, wants="hw")


@pytest.mark.parametrize("kind", ["bias", "capped"])
def test_improbable_targets_go_through_bias_softcap_and_divergence(kind, backend, monkeypatch):
    problem = make_problem(kind, seed=3)
    options = problem.options | ({"softcap": 60.0} if kind == "capped" else {})
    # Far below e^-44 in some rows, and above e^-87, where the divergence takes what is smaller as equal, in all.
    sharper = 11 if kind == "capped" else 4 if CUDA else 8
    problem = replace(problem, weight=problem.weight * sharper, options=options)
    limit_rows(monkeypatch, LARGEST_QUESTION * LONG if CUDA else LARGEST_QUESTION)
    # An entropy is a difference of two numbers near 44 where the target is so improbable: 2^-19 each.
    result = assert_as_good_as_torch(everything, problem, torch.float32, floor=1e-5, divergence_weight=0.4)
    assert float(result["logprob"].min()) < -44  # where the pivot changes


@pytest.mark.parametrize("gap", [30.0, 60.0, 85.0, 120.0])
def test_two_certain_answers_that_differ_are_as_far_apart_as_float32_can_tell(gap, backend):
    logits = torch.zeros(2, 40)
    logits[0, 3] = logits[1, 7] = gap
    problem = identity_problem(logits, torch.tensor([3, 7]), layout=[1, 1])
    host = Ragged.build(
        sequence_lengths=[2, 2], prompt_lengths=[1, 1], rationales_per_question=[2], answer_spans=[(0, 1), (0, 1)]
    )
    problem = replace(problem, ragged=host.to(DEVICE)).to(torch.float32)
    result = weighted(problem, divergence_weight=1.0)
    truth = weighted(problem.to(torch.float64), divergence_weight=1.0, implementation="reference")
    if gap < 87:
        assert errors(result, truth)["divergence"] <= 1e-5 * float(truth["divergence"])
    else:  # a probability below the smallest normal number, e^-87.3, counts as that
        assert 87 / gap <= float(result["divergence"] / truth["divergence"]) <= 1
    assert errors(result, truth)["dhidden"] <= 1e-5 * float(truth["dhidden"].norm())


@pytest.mark.parametrize("shift", [-4096.0, 4096.0])
def test_a_shift_of_all_logits_changes_nothing(shift, backend):
    generator = torch.Generator().manual_seed(2)
    logits = (torch.randn(9, 40, generator=generator) * 2 * 256).round() / 256  # exact in float32, shifted or not
    targets = torch.randint(40, (9,), generator=generator)
    targets[4] = -100
    for wants in ("hw", "h"):
        plain, moved = (
            weighted(identity_problem(z, targets).to(torch.float32), wants=wants) for z in (logits, logits + shift)
        )
        moved.pop("dweight", None), plain.pop("dweight", None)  # which is a product with what was shifted
        for name, error in errors(moved, plain).items():
            assert error <= 2e-6 * float(plain[name].norm()), name


def test_a_large_bias_errs_at_most_twice_as_much_as_torch(backend):
    problem = make_problem("bias", seed=2)
    assert problem.bias is not None
    problem.bias.add_(4096.0)
    assert_as_good_as_torch(logprob_gradients, problem, torch.float32, wants="hwb")
    assert_as_good_as_torch(logprob_gradients, problem, torch.float32, wants="h", which="l")


def only_row(row: int, values: Any) -> bool:
    """Whether this entry and no other is NaN."""
    return values.isnan().nonzero().flatten().tolist() == [row]


# ---- forbidden tokens, NaN, ids out of range --------------------------------------------------------------------


def with_forbidden(seed: int) -> Problem:
    problem = make_problem("bias", seed=seed)
    assert problem.bias is not None
    answers = torch.cat([problem.targets, problem.ragged.evidence_ids])
    free = [token for token in range(problem.bias.shape[0]) if token not in set(answers.tolist())]
    problem.bias[free[::2]] = -INF
    return problem


@pytest.mark.parametrize(
    ("wants", "divergence", "dtype"),
    [("hwb", "kl", torch.float32), ("hwb", "jsd", torch.bfloat16), ("h", "jsd", torch.float32)],
)
def test_forbidden_tokens_have_no_probability_and_no_gradient(wants, divergence, dtype, backend):
    problem = with_forbidden(3)
    options: dict[str, Any] = {"divergence": divergence, "divergence_weight": 0.4, "wants": wants}
    result = assert_as_good_as_torch(everything, problem, dtype, **options)
    if wants == "hwb":
        assert not result["dbias"][problem.bias == -INF].any() and not result["dweight"][problem.bias == -INF].any()


def test_forbidden_tokens_have_no_part_in_the_entropy(backend):
    assert_as_good_as_torch(logprob_gradients, with_forbidden(4), torch.float32)


@pytest.mark.parametrize("wants", ["hwb", ""])
def test_a_forbidden_answer_is_known_to_be_impossible_and_spoils_nothing_else(wants, backend):
    problem = with_forbidden(5)
    assert problem.bias is not None
    forbidden = problem.bias.isinf().nonzero()[0]
    ids = problem.ragged.evidence_ids.clone()
    ids[0] = forbidden[0]  # one of the two ids of the first rationale
    host = replace(problem.ragged.host, evidence_ids=ids.cpu())
    result = weighted(replace(problem, ragged=host.to(DEVICE)).to(torch.float32), wants=wants)
    expected = weighted(problem.to(torch.float32), wants=wants)
    own = slice(0, int(problem.ragged.host.cu_rows[1]))
    assert (result["evidence"][own] < -1e30).all()
    for name in expected:
        if name not in ("evidence", "adaptability"):
            assert torch.equal(result[name], expected[name]), name
    assert torch.equal(result["evidence"][own.stop :], expected["evidence"][own.stop :])


@pytest.mark.parametrize("wants", ["hw", "h", ""])
def test_nan_in_gives_nan_out(wants, backend):
    problem = make_problem(seed=6).to(torch.float32)
    row = int(problem.ragged.rows[2])
    problem.targets[row] = 5
    problem.hidden[row, 3] = math.nan
    result = weighted(problem, wants=wants)
    assert result["loss"].isnan() and only_row(2, result["logprob"])
    if wants:
        assert result["dhidden"][row].isnan().all()
        assert not result["dhidden"][row + 1 :].isnan().any()


@pytest.mark.parametrize(("target", "wants"), [(-1, "h"), (100, "hw"), (2**40, "hw")])
def test_a_target_out_of_range_gives_nan_and_reads_no_foreign_memory(monkeypatch, target, wants, triton_kernels):

    monkeypatch.setattr(arguments, "check_values", lambda *_: None)  # as on a GPU, where ids are not looked at
    problem = make_problem(vocabulary=100, seed=7).to(torch.float32)
    problem.targets[problem.ragged.rows[2]] = target
    result = weighted(problem, wants=wants)
    assert result["loss"].isnan() and only_row(2, result["logprob"])
    logprob = linear_logprob(problem.hidden, problem.weight, problem.targets)[0]
    assert int(logprob.isnan().sum()) == 1


# ---- batches with nothing in them -------------------------------------------------------------------------------


def ones(statistics: Statistics) -> Tensor:
    return torch.ones_like(statistics.difficulty)


@pytest.mark.parametrize("reduction", ["mean", "token"])
@pytest.mark.parametrize("rule", ["given", "by_question", "any_rule"])
@pytest.mark.parametrize("wants", ["hwb", "h"])
def test_a_batch_without_a_target_has_loss_zero_and_zero_gradients(wants, rule, reduction, backend):
    problem = make_problem("bias", seed=8, layout=LAYOUT[1:]).to(torch.float32)
    ignored = torch.full_like(problem.targets, -100)
    shape = (problem.ragged.host.cu_seqlens, problem.ragged.host.cu_questions)
    all_ignored = replace(problem, targets=ignored)
    none_scored = replace(all_ignored, ragged=Ragged.from_labels(ignored, *shape).to(DEVICE))
    rules: dict[str, Any] = {"given": {"weights": torch.ones_like(problem.consensus)}, "any_rule": {"rule": ones}}
    options = rules.get(rule, {})
    # Ignored targets leave the answers' divergence; without rows there are no answers either.
    for batch, divergence_weight in ((all_ignored, 0.0), (none_scored, 0.5)):
        more = {"sft_reduction": reduction, "divergence_weight": divergence_weight}
        result = everything(batch, wants=wants, **options, **more)
        assert result["loss"] == 0 and result["sft"] == 0 and result["divergence"] == 0
        for name in GRADIENTS:
            assert name not in result or not result[name].any(), name


def test_logprobs_of_no_rows_are_connected_and_empty(backend):
    problem = make_problem("bias").to(torch.float32)
    problem = replace(problem, hidden=problem.hidden[:0], targets=problem.targets[:0])
    for wants in ("hwb", "h"):
        result = logprob_gradients(problem, wants=wants)
        assert result["logprob"].shape == result["entropy"].shape == (0,)
        for name in GRADIENTS:
            assert name not in result or not result[name].any(), name


def test_a_single_rationale_weighs_one_whatever_its_statistics(backend):
    problem = make_problem(seed=9, layout=(((1, 1),), ((4, 0),)))
    result = assert_as_good_as_torch(everything, problem, torch.float32, divergence_weight=0.5)
    assert result["alpha"].tolist() == [1.0, 1.0] and result["divergence"] == 0


def test_a_forbidden_target_has_an_infinite_loss(backend):
    problem = make_problem("bias", ignored=0.0)
    row = problem.ragged.rows[0]
    problem.bias[problem.targets[row]] = -torch.inf
    problem, wanted = leaves(problem.to(torch.float32), "hwb")
    logprob, entropy = logprob_of(problem)
    assert logprob[row] == -torch.inf
    entropy.sum().backward()
    found = {name: leaf.grad for name, leaf in wanted.items()}
    problem, wanted = leaves(problem, "hwb")
    logprob_of(problem, implementation="reference")[1].sum().backward()
    for name, leaf in wanted.items():
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-4, atol=1e-4)


# ---- layouts in memory --------------------------------------------------------------------------------------------


def spread(vector: Tensor) -> Tensor:
    """The same numbers, a column of a matrix."""
    return torch.stack([vector, vector.flip(0), vector.flip(0)], 1)[:, 0]


def alike(vector: Tensor) -> Tensor:
    """One of the numbers, expanded: so is the gradient of a sum."""
    return vector[-1:].expand_as(vector)


@pytest.mark.parametrize("laid", [spread, alike])
@pytest.mark.parametrize("trains", [True, False])
def test_vectors_are_read_as_they_lie_in_memory(backend, laid, trains):
    problem = make_problem("bias", ignored=0.0).to(torch.float32)
    ragged = problem.ragged
    vectors = {
        "targets": problem.targets,
        "bias": problem.bias,
        "alpha": torch.linspace(0.4, 1.1, ragged.num_sequences, device=DEVICE),
        "consensus": problem.consensus.float(),
        "upstream": torch.linspace(-1, 1, problem.targets.numel(), device=DEVICE),
    }

    def results(lay: Any) -> list[Tensor]:
        v = {name: lay(vector) for name, vector in vectors.items()}
        hidden, weight = problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_(trains)
        head = (hidden, weight, v["targets"])
        given = compatibility_loss(*head, ragged, weights=v["alpha"], bias=v["bias"], divergence_weight=0.1)
        ruled = compatibility_loss(
            *head, ragged, consensus=v["consensus"], difficulty_reference=v["alpha"], bias=v["bias"]
        )
        tokens = linear_logprob(*head, bias=v["bias"])
        apart = answer_divergence(hidden, weight, ragged, v["alpha"], bias=v["bias"])
        outputs = [given.loss, ruled.loss, *tokens, apart]
        upstream = [None, None, v["upstream"], v["upstream"], torch.ones_like(apart)]
        leaves = [hidden, weight] if trains else [hidden]
        return [*outputs, given.alpha, ruled.alpha, *torch.autograd.grad(outputs, leaves, upstream)]

    for found, expected in zip(results(laid), results(lambda vector: laid(vector).contiguous()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
