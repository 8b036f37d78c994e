"""compatibility_loss and its kin against the method in loops, in float64 unless a test says otherwise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityRule,
    Ragged,
    answer_divergence,
    compatibility_loss,
    linear_logprob,
    linear_token_stats,
    question_affinity,
    question_consensus,
)
from tests import brute_force as loops
from tests.brute_force import Batch, Head, Question

COUNTS = (3, 1, 5, 2, 4)
NAN = math.nan


def close(actual: Any, expected: Any, atol: float = 1e-10, rtol: float = 1e-9) -> None:
    """Compares in float64; a list or a number is one of Python's floats."""
    actual, expected = (
        x.detach() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64) for x in (actual, expected)
    )
    torch.testing.assert_close(actual.double(), expected.double(), atol=atol, rtol=rtol)


def run(batch: Batch, head: Head, **options: Any) -> Any:
    options.setdefault("consensus", batch.consensus)
    return compatibility_loss(batch.hidden, head.weight, batch.targets, batch.ragged, **head.options, **options)


def gradients(loss: Tensor, batch: Batch, head: Head) -> list[Tensor]:
    """Of hidden, weight and, if there is one, bias; an unconnected one is an error."""
    return list(torch.autograd.grad(loss, [batch.hidden, *head.leaves()], retain_graph=True))


def make(seed: int = 0, kind: str = "bias", counts: tuple[int, ...] = COUNTS) -> tuple[list[Question], Batch, Head]:
    questions = loops.random_questions(seed, counts)
    return questions, loops.pack(questions), loops.random_head(torch.Generator().manual_seed(seed), kind)


# ---- eq. 2–11 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalizers", [None, (0.37, 0.21)], ids=["own_batch", "window"])
@pytest.mark.parametrize("divergence", ["kl", "jsd"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
@pytest.mark.parametrize("kind", ["plain", "bias", "capped"])
def test_the_loss_and_its_gradients_are_those_of_the_method(kind, reduction, divergence, normalizers):
    questions, batch, head = make(seed=len(kind) + len(reduction), kind=kind)
    lam = 0.3
    options = {} if normalizers is None else dict(zip(("normalizer", "divergence_normalizer"), normalizers))
    output = run(batch, head, sft_reduction=reduction, divergence=divergence, divergence_weight=lam, **options)

    logps = loops.log_probabilities(questions, batch.hidden, head)
    weights = [
        loops.alpha([(loops.adaptability(r, p), r.consensus, loops.difficulty(r, p)) for r, p in zip(question, rows)])
        for question, rows in zip(questions, logps)
    ]
    count, tokens = loops.denominators(questions)
    for_sft, for_divergence = normalizers or (1 / (tokens if reduction == "token" else count), 1 / count)
    sft = for_sft * loops.sft(questions, logps, weights, reduction)
    parts = [loops.divergence(*parts, kind=divergence) for parts in zip(questions, logps, weights)]
    mixed = for_divergence * torch.stack(parts).sum()
    close(output.alpha, sum(weights, []))
    close(output.sft, sft)
    close(output.divergence, mixed)
    close(output.loss, sft + lam * mixed)
    expected = gradients(sft + lam * mixed, batch, head)
    for actual, wanted in zip(gradients(output.loss, batch, head), expected):
        close(actual, wanted)


@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_the_token_statistics_are_those_of_the_full_softmax(kind):
    questions, batch, head = make(seed=4, kind=kind)
    output = run(batch, head)
    parts = [
        loops.token_statistics(*pair)
        for pair in zip(questions, loops.log_probabilities(questions, batch.hidden, head))
    ]
    for name in ("logprob", "entropy", "evidence", "grad_norm"):
        close(getattr(output.statistics.tokens, name), sum((part[name] for part in parts), []))
    alone = linear_token_stats(batch.hidden, head.weight, batch.targets, batch.ragged, **head.options)
    for separately, inside in zip(alone, output.statistics.tokens):
        assert torch.equal(separately, inside) and not separately.requires_grad


@pytest.mark.parametrize("span", ["body", "all"])
@pytest.mark.parametrize("length_norm", ["none", "mean"])
@pytest.mark.parametrize("epsilon", [0.1, 0.0, 1.0])
def test_the_metrics_of_a_rationale_are_eq_3_and_6(span, length_norm, epsilon):
    questions, batch, head = make(seed=5)
    options = AdaptabilityOptions(epsilon=epsilon, span=span, length_norm=length_norm)
    reference = torch.linspace(0.5, 3.0, batch.ragged.num_sequences, dtype=torch.float64)
    plain = run(batch, head, adaptability=options).statistics
    ifd = run(batch, head, adaptability=options, difficulty_reference=reference).statistics
    pairs = [
        (r, p)
        for question, rows in zip(questions, loops.log_probabilities(questions, batch.hidden, head))
        for r, p in zip(question, rows)
    ]
    wanted = [loops.adaptability(r, p, epsilon, span, length_norm == "mean") for r, p in pairs]
    difficulty = torch.tensor([loops.difficulty(r, p) for r, p in pairs], dtype=torch.float64)
    close(plain.adaptability, wanted)
    close(plain.difficulty, difficulty)
    close(ifd.difficulty, difficulty / reference)
    close(plain.consensus, batch.consensus)
    close(plain.targets_per_rationale, [sum(t >= 0 for t in r.targets) for r, _ in pairs])


def test_whole_completions_as_bodies_end_at_the_last_scored_row():
    questions = loops.random_questions(6, (3, 2))
    for r in sum(questions, []):
        r.body = len(r.targets)
    batch, head = loops.pack(questions), loops.random_head(torch.Generator().manual_seed(6))
    logps = sum(loops.log_probabilities(questions, batch.hidden, head), [])
    close(
        run(batch, head).statistics.adaptability,
        [loops.adaptability(r, p) for r, p in zip(sum(questions, []), logps)],
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
@pytest.mark.parametrize("divergence", ["kl", "jsd"])
def test_finite_differences_confirm_the_gradients(divergence, reduction):
    questions = loops.random_questions(7, (3, 1), vocabulary=5, width=2)
    batch = loops.pack(questions)
    head = loops.random_head(torch.Generator().manual_seed(7), "capped", vocabulary=5, width=2)
    weights = torch.tensor([0.2, 0.5, 0.3, 1.0], dtype=torch.float64)
    options = {name: value for name, value in head.options.items() if name != "bias"}

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return compatibility_loss(
            hidden,
            weight,
            batch.targets,
            batch.ragged,
            weights=weights,
            bias=bias,
            sft_reduction=reduction,
            divergence=divergence,
            divergence_weight=0.5,
            **options,
        ).loss

    assert torch.autograd.gradcheck(loss, (batch.hidden, *head.leaves()))


# ---- what is detached -----------------------------------------------------------------------------------------


def test_the_gradient_is_that_of_the_weighted_losses_with_the_weights_held_fixed():
    _, batch, head = make(seed=8)
    output = run(batch, head, divergence_weight=0.2)
    fixed = run(batch, head, divergence_weight=0.2, weights=output.alpha.clone())
    assert torch.equal(output.loss, fixed.loss)
    for actual, wanted in zip(gradients(output.loss, batch, head), gradients(fixed.loss, batch, head)):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("argument", ["consensus", "difficulty_reference", "weights"])
def test_nothing_flows_into_what_decides_the_weights(argument):
    _, batch, head = make(seed=9)
    given = torch.rand(batch.ragged.num_sequences, dtype=torch.float64).add(0.1).requires_grad_()
    output = run(batch, head, divergence_weight=0.2, **{argument: given})
    assert not output.alpha.requires_grad
    divergence = answer_divergence(batch.hidden, head.weight, batch.ragged, given)
    (output.loss + divergence.sum()).backward()
    assert given.grad is None
    assert batch.hidden.grad is not None


def test_everything_but_the_loss_is_detached():
    _, batch, head = make(seed=10)
    seen = []

    def rule(statistics):
        seen.append(torch.is_grad_enabled())
        return CompatibilityRule()(statistics) * learned

    learned = torch.ones((), dtype=torch.float64, requires_grad=True)
    output = run(batch, head, rule=rule, consensus=batch.consensus.requires_grad_(), divergence_weight=0.2)
    statistics = output.statistics
    others = [output.alpha, output.sft, output.divergence, *statistics.tokens]
    others += [
        statistics.adaptability,
        statistics.consensus,
        statistics.difficulty,
        statistics.targets_per_rationale,
    ]
    assert output.loss.requires_grad and not any(tensor.requires_grad for tensor in others)
    assert seen == [False]
    output.loss.backward()
    assert learned.grad is None


# ---- the divergence -------------------------------------------------------------------------------------------


def pair_of(first: Tensor, second: Tensor, row_count: int = 1) -> tuple[Tensor, Tensor, Ragged]:
    """Two rationales of one question whose answer rows have the given logits, under an identity head."""
    hidden = torch.cat([first, second])
    ragged = Ragged.build(
        sequence_lengths=[row_count + 1] * 2,
        prompt_lengths=[1, 1],
        rationales_per_question=[2],
        answer_spans=[(0, row_count)] * 2,
    )
    end = torch.zeros(1, hidden.shape[1], dtype=hidden.dtype)
    return torch.cat([first, end, second, end]), torch.eye(hidden.shape[1], dtype=hidden.dtype), ragged


def test_the_kl_sum_is_the_symmetrised_sum_over_pairs():
    questions, batch, head = make(seed=11)
    weights = torch.rand(batch.ragged.num_sequences, dtype=torch.float64)
    actual = answer_divergence(batch.hidden, head.weight, batch.ragged, weights, **head.options)
    logps, start = loops.log_probabilities(questions, batch.hidden, head), 0
    for q, (question, rows) in enumerate(zip(questions, logps)):
        spans = [p[r.span[0] : sum(r.span)] for r, p in zip(question, rows)]
        total = torch.zeros((), dtype=torch.float64)
        for k in range(len(spans)):
            for j in range(k + 1, len(spans)):
                if len(spans[k]) == len(spans[j]) > 0:
                    both = loops.kl(spans[k], spans[j]) + loops.kl(spans[j], spans[k])
                    total = total + weights[start + k] * weights[start + j] * both
        close(actual[q], total)
        start += len(question)


def test_jsd_is_symmetric_and_at_most_log_2_and_kl_is_neither():
    generator = torch.Generator().manual_seed(12)
    ones = torch.ones(2, dtype=torch.float64)
    for scale in (0.1, 1.0, 30.0, 300.0):
        first, second = (scale * torch.randn(2, 3, 11, generator=generator, dtype=torch.float64)).unbind()
        hidden, identity, ragged = pair_of(first, second, 3)
        forward = answer_divergence(hidden, identity, ragged, ones, kind="jsd")
        close(forward, answer_divergence(*pair_of(second, first, 3), ones, kind="jsd"))
        assert 0 < forward.item() <= math.log(2) + 1e-12
    assert forward.item() > 0.6  # the bound is reached by distributions that exclude each other
    assert answer_divergence(hidden, identity, ragged, ones, kind="kl").item() > 2 * math.log(2)


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_rationales_that_agree_or_stand_alone_do_not_diverge(kind):
    logits = torch.randn(2, 9, dtype=torch.float64)
    close(answer_divergence(*pair_of(logits, logits, 2), torch.ones(2, dtype=torch.float64), kind=kind), [0.0])
    _, batch, head = make(seed=13, counts=(1, 1))
    output = run(batch, head, divergence=kind, divergence_weight=5.0)
    close(output.alpha, [1.0, 1.0])
    assert output.divergence == 0
    without = run(batch, head)
    assert torch.equal(output.loss, without.loss)
    assert all(map(torch.equal, gradients(output.loss, batch, head), gradients(without.loss, batch, head)))


# ---- invariances ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_micro_batches_add_up_to_the_whole_window(reduction):
    questions, whole, head = make(seed=14)
    count, tokens = loops.denominators(questions)
    common = {
        "sft_reduction": reduction,
        "divergence_weight": 0.4,
        "normalizer": 1 / (tokens if reduction == "token" else count),
        "divergence_normalizer": torch.tensor(1 / count, dtype=torch.float64),
    }
    expected = run(whole, head, sft_reduction=reduction, divergence_weight=0.4)
    wanted = gradients(expected.loss, whole, head)
    parts = [loops.pack(questions[:2]), loops.pack(questions[2:])]
    outputs = [run(part, head, **common) for part in parts]
    got = [gradients(output.loss, part, head) for output, part in zip(outputs, parts)]
    close(outputs[0].loss + outputs[1].loss, expected.loss)
    close(torch.cat([outputs[0].alpha, outputs[1].alpha]), expected.alpha)
    close(torch.cat([got[0][0], got[1][0]]), wanted[0])
    for first, second, total in zip(got[0][1:], got[1][1:], wanted[1:]):
        close(first + second, total)


def test_the_order_of_a_questions_rationales_does_not_matter():
    questions, batch, head = make(seed=15, counts=(5, 3))
    order = [3, 0, 4, 1, 2]
    permuted = loops.pack([[questions[0][k] for k in order], questions[1]])
    first, second = run(batch, head, divergence_weight=0.4), run(permuted, head, divergence_weight=0.4)
    close(second.alpha[:5], first.alpha[order])
    close(second.loss, first.loss)
    pieces = gradients(first.loss, batch, head)[0].split([len(r.hidden) for r in sum(questions, [])])
    close(gradients(second.loss, permuted, head)[0], torch.cat([pieces[k] for k in order] + list(pieces[5:])))


def test_the_weights_of_a_question_read_no_other_question():
    questions, batch, head = make(seed=16, counts=(3, 4))
    alpha = run(batch, head).alpha
    for r in questions[1]:
        r.hidden, r.consensus = 3 * r.hidden + 1, r.consensus**2
    changed = run(loops.pack(questions), head).alpha
    close(changed[:3], alpha[:3], atol=1e-15)
    assert not torch.allclose(changed[3:], alpha[3:])


@pytest.mark.parametrize(
    ("field", "change"),
    [("adaptability", "evidence"), ("consensus", "consensus"), ("difficulty", "targets")],
)
def test_without_a_metric_the_weights_ignore_what_it_measures(field, change):
    questions = loops.random_questions(17, (4,))
    head = loops.random_head(torch.Generator().manual_seed(17))
    other = [[replace(r) for r in questions[0]]]
    for k, r in enumerate(other[0]):
        if change == "consensus":
            r.consensus = 1 - r.consensus**2
        elif change == "evidence":
            r.evidence = [3 * k + 1]
        else:
            r.targets = [(token + 7) % 23 for token in r.targets]
    for beta, same in ((0.0, True), (1.0, False)):
        rule = replace(CompatibilityRule(), **{field: beta})
        before, after = (run(loops.pack(q), head, rule=rule).alpha for q in (questions, other))
        assert torch.allclose(before, after, atol=1e-12) == same


def test_one_rationale_a_question_under_token_reduction_is_cross_entropy():
    questions = loops.random_questions(18, (1, 1, 1), ignored=0.3)
    batch = loops.pack(questions)
    hidden = batch.hidden.detach().float().requires_grad_()
    weight = torch.randn(23, 7, requires_grad=True)
    loss = compatibility_loss(
        hidden, weight, batch.targets, batch.ragged, rule=CompatibilityRule(consensus=0), sft_reduction="token"
    ).loss
    expected = F.cross_entropy(hidden @ weight.T, batch.targets)
    close(loss, expected, atol=1e-6, rtol=1e-6)
    leaves = (hidden, weight)
    for actual, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        close(actual, wanted, atol=1e-6, rtol=1e-5)


# ---- nasty inputs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
@pytest.mark.parametrize("rows", ["ignored", "absent"])
def test_a_batch_without_a_target_costs_nothing_and_stays_connected(rows, reduction):
    _, batch, head = make(seed=19)
    batch.targets = torch.full_like(batch.targets, loops.IGNORED)
    if rows == "absent":
        batch.ragged = Ragged.from_labels(batch.targets, batch.ragged.cu_seqlens, batch.ragged.cu_questions)
    output = run(batch, head, sft_reduction=reduction)
    assert output.loss == 0 and output.loss.requires_grad
    assert all(torch.count_nonzero(g) == 0 for g in gradients(output.loss, batch, head))
    assert output.alpha.isfinite().all()
    assert output.statistics.tokens.logprob.shape == (batch.ragged.num_rows,)


def test_a_batch_of_no_questions_costs_nothing():
    empty = loops.random_head(torch.Generator().manual_seed(0))
    ragged = Ragged.build(sequence_lengths=[], prompt_lengths=[], rationales_per_question=[])
    hidden = torch.zeros(0, 7, dtype=torch.float64, requires_grad=True)
    output = compatibility_loss(
        hidden, empty.weight, torch.zeros(0, dtype=torch.int64), ragged, consensus=hidden[:, 0], divergence_weight=1.0
    )
    assert output.loss == 0 and output.alpha.shape == (0,)
    assert torch.autograd.grad(output.loss, empty.weight)[0].count_nonzero() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "token"])
def test_only_questions_with_a_target_are_counted(reduction):
    questions, _, head = make(seed=20, counts=(2, 3, 2))
    for r in questions[1]:
        r.targets = [loops.IGNORED] * len(r.targets)
    both = run(loops.pack(questions), head, sft_reduction=reduction, divergence_weight=0.0)
    alone = run(loops.pack([questions[0], questions[2]]), head, sft_reduction=reduction, divergence_weight=0.0)
    close(both.loss, alone.loss)


def test_fewer_targets_than_rationales_are_still_divided_by_n():
    questions, _, head = make(seed=21, counts=(4,))
    for k, r in enumerate(questions[0]):
        r.targets = [3 if k == 0 and t == 0 else loops.IGNORED for t in range(len(r.targets))]
    batch = loops.pack(questions)
    output = run(batch, head, sft_reduction="token")  # N = 1/4
    close(output.loss, -4 * output.alpha[0] * output.statistics.tokens.logprob[0])


def test_a_single_token_is_a_batch():
    ragged = Ragged.build(sequence_lengths=[2], prompt_lengths=[1], rationales_per_question=[1], evidence_ids=[[2]])
    hidden = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([4, -100])
    output = compatibility_loss(hidden, weight, targets, ragged, rule=CompatibilityRule(consensus=0))
    close(output.loss, F.cross_entropy(hidden[:1] @ weight.T, targets[:1]))
    assert output.statistics.adaptability == 0


def with_logits(z: Tensor) -> tuple[Tensor, Tensor, Ragged]:
    """(hidden, identity head, ragged) whose scored rows have exactly the logits z (N, V)."""
    ragged = Ragged.build(
        sequence_lengths=[len(z) + 1], prompt_lengths=[1], rationales_per_question=[1], evidence_ids=[[0]]
    )
    return torch.cat([z, torch.zeros_like(z[:1])]), torch.eye(z.shape[1], dtype=z.dtype), ragged


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0, 80.0, -80.0])
def test_confident_tokens_keep_their_digits(gap):
    z = torch.tensor([[0.0, 0.5, -0.25, 0.125, -1.0]])
    z[0, 2] += gap  # the target, or the least likely token
    targets = torch.tensor([2, -100])
    hidden, head, ragged = with_logits(z)
    actual = linear_token_stats(hidden, head, targets, ragged)
    expected = linear_token_stats(hidden.double(), head.double(), targets, ragged)
    close(actual.logprob, expected.logprob, atol=2e-7, rtol=2e-7)
    close(actual.evidence, expected.evidence, atol=2e-7, rtol=2e-7)
    close(actual.entropy, expected.entropy, atol=2e-7, rtol=2e-7)
    close(actual.grad_norm, expected.grad_norm, atol=1e-20, rtol=2e-5)
    others = [float(x) for k, x in enumerate(z.double().softmax(-1)[0]) if k != 2]  # 1 − p without cancellation
    close(expected.grad_norm[0], math.sqrt(sum(others) ** 2 + sum(x * x for x in others)), atol=0.0, rtol=1e-9)
    hidden.requires_grad_()
    logprob, entropy = linear_logprob(hidden[:1], head, targets[:1])
    close(logprob, expected.logprob, atol=2e-7, rtol=2e-7)
    close(entropy, expected.entropy, atol=2e-7, rtol=2e-7)
    (logprob + entropy).sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_a_common_shift_of_the_logits_costs_no_accuracy():
    z = torch.randint(-4096, 4096, (6, 50), generator=torch.Generator().manual_seed(22)) / 1024
    targets = torch.tensor([7, 8, 9, 10, 11, 12, -100])
    expected = linear_token_stats(*with_logits(z.double())[:2], targets, with_logits(z)[2])
    hidden, head, ragged = with_logits(z + 4096)  # exact in float32
    for actual, wanted in zip(linear_token_stats(hidden, head, targets, ragged), expected):
        close(actual, wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("divergence", ["kl", "jsd"])
def test_tokens_forbidden_through_the_bias_are_as_if_they_did_not_exist(divergence):
    questions, batch, head = make(seed=23)
    forbidden = torch.zeros(30, dtype=torch.bool)
    forbidden[23:] = True
    bias = F.pad(head.options["bias"].detach(), (0, 7), value=-math.inf)
    wide = Head(torch.cat([head.weight.detach(), torch.randn(7, 7, dtype=torch.float64)]).requires_grad_())
    wide.options["bias"] = bias.requires_grad_()
    output, expected = (run(batch, h, divergence=divergence, divergence_weight=0.4) for h in (wide, head))
    close(output.loss, expected.loss)
    for actual, wanted in zip(output.statistics.tokens, expected.statistics.tokens):
        close(actual, wanted)
    got, wanted = gradients(output.loss, batch, wide), gradients(expected.loss, batch, head)
    close(got[0], wanted[0])
    for actual, narrow in zip(got[1:], wanted[1:]):
        close(actual[:23], narrow)
        assert actual[23:].count_nonzero() == 0
    targets = batch.targets.where(batch.targets >= 0, 0)
    results = [
        torch.stack(linear_logprob(batch.hidden, h.weight, targets, bias=h.options["bias"])).sum()
        for h in (wide, head)
    ]
    close(results[0], results[1])
    close(gradients(results[0], batch, wide)[0], gradients(results[1], batch, head)[0])


def test_rows_that_are_not_scored_neither_leak_nor_receive():
    questions, batch, head = make(seed=24)
    clean = run(batch, head, divergence_weight=0.3)
    wanted = gradients(clean.loss, batch, head)
    unscored = torch.ones(len(batch.hidden), dtype=torch.bool)
    unscored[batch.ragged.rows] = False
    assert unscored.sum() > 15
    batch.hidden = batch.hidden.detach().masked_fill(unscored[:, None], NAN).requires_grad_()
    output = run(batch, head, divergence_weight=0.3)
    assert torch.equal(output.loss, clean.loss)
    for actual, expected in zip(gradients(output.loss, batch, head), wanted):
        assert torch.equal(actual, expected)
    assert wanted[0][unscored].count_nonzero() == 0


def test_strides_do_not_matter():
    _, batch, head = make(seed=25)
    expected = run(batch, head, divergence_weight=0.3)
    wanted = gradients(expected.loss, batch, head)
    strided = Batch(
        torch.stack([batch.hidden.detach()] * 2, dim=2)[..., 0].requires_grad_(),
        torch.stack([batch.targets] * 2, dim=1)[:, 0],
        batch.ragged,
        batch.consensus,
    )
    transposed = Head(head.weight.detach().T.contiguous().T.requires_grad_(), head.options)
    assert not strided.hidden.is_contiguous() and not transposed.weight.is_contiguous()
    output = run(strided, transposed, divergence_weight=0.3)
    close(output.loss, expected.loss)
    for actual, reference in zip(gradients(output.loss, strided, transposed), wanted):
        close(actual, reference)


def test_bfloat16_is_within_twice_torchs_own_error():
    questions = loops.random_questions(26, (4, 3, 5), vocabulary=501, width=64)
    batch = loops.pack(questions)
    generator = torch.Generator().manual_seed(26)
    hidden = batch.hidden.detach().bfloat16()
    weight = (torch.randn(501, 64, generator=generator) / 4).bfloat16()
    weights = torch.rand(12, generator=generator)

    def plain(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        rows, targets = hidden[batch.ragged.rows], batch.targets[batch.ragged.rows]
        logp = F.linear(rows, weight)
        logp = logp.to(torch.promote_types(logp.dtype, torch.float32)).log_softmax(-1)
        share = weights.repeat_interleave(batch.ragged.cu_rows.diff().long()) / 3
        logprob = logp.gather(1, targets.clamp_min(0)[:, None]).squeeze(1) * (targets >= 0)
        loss = -(share * logprob).sum()
        return [
            loss.detach(),
            logprob.detach(),
            -(logp.exp() * logp).sum(-1).detach(),
            *torch.autograd.grad(loss, (hidden, weight)),
        ]

    hidden.requires_grad_(), weight.requires_grad_()
    output = compatibility_loss(hidden, weight, batch.targets, batch.ragged, weights=weights, sft_reduction="sum")
    tokens = output.statistics.tokens
    ours = [output.loss, tokens.logprob, tokens.entropy, *torch.autograd.grad(output.loss, (hidden, weight))]
    assert [t.dtype for t in ours] == [torch.float32] * 3 + [torch.bfloat16] * 2
    for mine, theirs, truth in zip(ours, plain(hidden, weight), plain(hidden.double(), weight.double())):
        assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max()


# ---- memory ---------------------------------------------------------------------------------------------------


def test_chunks_of_one_row_give_what_one_chunk_gives():
    _, batch, head = make(seed=27, kind="capped")
    whole = run(batch, head, divergence_weight=0.3)
    small = run(batch, head, divergence_weight=0.3, workspace_mib=0)
    close(small.loss, whole.loss)
    for left, right in zip(gradients(small.loss, batch, head), gradients(whole.loss, batch, head)):
        close(left, right)
    for left, right in zip(small.statistics.tokens, whole.statistics.tokens):
        close(left, right)
    upstream = torch.rand(2, len(batch.hidden), dtype=torch.float64)
    pairs = []
    for mib in (0, 256):
        values = linear_logprob(batch.hidden, head.weight, batch.targets, workspace_mib=mib, **head.options)
        loss = (upstream * torch.stack(values)).sum()
        pairs.append([*values, *gradients(loss, batch, head)])
    for left, right in zip(*pairs):
        close(left, right)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, forward and backward."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_are_never_whole():
    vocabulary, width, length = 70_001, 2, 40
    ragged = Ragged.build(sequence_lengths=[length + 1], prompt_lengths=[1], rationales_per_question=[1])
    hidden = torch.randn(length + 1, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(vocabulary, (length + 1,))
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        output = compatibility_loss(
            hidden, weight, targets, ragged, rule=CompatibilityRule(consensus=0), workspace_mib=1
        )
        output.loss.backward()
        logprob, entropy = linear_logprob(hidden, weight, targets, workspace_mib=1)
        (logprob + entropy).sum().backward()
    assert vocabulary < largest.elements <= 4 * vocabulary  # 1 MiB is three rows of it
    assert max(saved) <= vocabulary * width


def test_a_frozen_head_gets_no_gradient():
    _, batch, head = make(seed=28)
    weight = head.weight.detach()
    run(batch, Head(weight), divergence_weight=0.3).loss.backward()
    assert weight.grad is None
    assert batch.hidden.grad is not None and batch.hidden.grad.count_nonzero() > 0


def test_statistics_are_float32_for_narrower_inputs_and_float64_for_float64():
    _, batch, head = make(seed=29, kind="plain")
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2):
        output = compatibility_loss(
            batch.hidden.to(dtype), head.weight.to(dtype), batch.targets, batch.ragged, consensus=batch.consensus
        )
        statistics = output.statistics
        metrics = (statistics.adaptability, statistics.consensus, statistics.difficulty)
        assert {t.dtype for t in (output.loss, output.alpha, *statistics.tokens, *metrics)} == {expected}


# ---- linear_logprob -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 5), (7,), (2, 1, 3), (0,)])
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_log_probabilities_and_entropies_take_any_upstream_gradient(shape, kind):
    generator = torch.Generator().manual_seed(30)
    head = loops.random_head(generator, kind)
    hidden = torch.randn(*shape, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(23, shape, generator=generator)
    targets[torch.rand(shape, generator=generator) < 0.3] = -1
    logprob, entropy = linear_logprob(hidden, head.weight, targets, ignore_index=-1, **head.options)
    logp = head.logp(hidden)
    counted = targets != -1
    expected = (
        logp.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * counted,
        -(logp.exp() * logp).sum(-1) * counted,
    )
    upstream = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    for actual, wanted in zip((logprob, entropy), expected):
        close(actual, wanted)
    leaves = [hidden, *head.leaves()]
    got = torch.autograd.grad([logprob, entropy], leaves, list(upstream))
    for mine, theirs in zip(got, torch.autograd.grad(expected, leaves, list(upstream))):
        close(mine, theirs)


def test_finite_differences_confirm_the_entropy():
    head = loops.random_head(torch.Generator().manual_seed(31), "bias", vocabulary=5, width=2)
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, 4, -100])
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprob(h, w, targets, bias=b, softcap=3.0), (hidden, *head.leaves())
    )


# ---- consensus ------------------------------------------------------------------------------------------------


def projections(seed: int, heads: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Ragged]:
    generator = torch.Generator().manual_seed(seed)
    count = sum(COUNTS)
    ragged = Ragged.build(
        sequence_lengths=[2] * count, prompt_lengths=[1] * count, rationales_per_question=list(COUNTS)
    )
    query, key = scale * torch.randn(2, count, heads, 6, generator=generator, dtype=torch.float64)
    return query, key, ragged


def graphs(query: Tensor, key: Tensor, temperature: float = 1.0) -> list[list[list[float]]]:
    """The affinities of every question."""
    return [loops.affinity(q, k, temperature) for q, k in zip(query.split(COUNTS), key.split(COUNTS))]


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.2, 5.0])
def test_consensus_is_the_weighted_in_degree_without_self_loops(heads, temperature):
    query, key, ragged = projections(32, heads)
    expected = [
        sum(a[i][k] for i in range(len(a)) if i != k) for a in graphs(query, key, temperature) for k in range(len(a))
    ]
    close(question_consensus(query, key, ragged, temperature=temperature), expected)
    affinity, present = question_affinity(query, key, ragged, temperature=temperature)
    assert present.sum(1).tolist() == list(COUNTS)
    for q, a in enumerate(graphs(query, key, temperature)):
        close(affinity[q, : len(a), : len(a)], a)
    close(affinity.sum((1, 2)), list(COUNTS))  # nothing beside them
    if heads == 1:
        flat = question_consensus(query[:, 0], key[:, 0], ragged, temperature=temperature)
        close(flat, expected)


@pytest.mark.parametrize("centrality", ["pagerank", "eigenvector"])
def test_other_centralities_are_those_of_networkx(centrality):
    query, key, ragged = projections(33, 2)
    expected = []
    for a in graphs(query, key):
        graph = nx.DiGraph()
        graph.add_nodes_from(range(len(a)))
        graph.add_weighted_edges_from((i, j, a[i][j]) for i in range(len(a)) for j in range(len(a)) if i != j)
        if len(a) == 1:
            scores = {0: 0.0}
        elif centrality == "pagerank":  # nx.pagerank itself wants SciPy
            scores = nx.algorithms.link_analysis.pagerank_alg._pagerank_python(graph, tol=1e-12, max_iter=1000)
        else:
            scores = nx.eigenvector_centrality(graph, weight="weight", tol=1e-12, max_iter=10_000)
        expected += [scores[k] for k in range(len(a))]
    close(question_consensus(query, key, ragged, centrality=centrality), expected, atol=1e-6)


@pytest.mark.parametrize("centrality", ["in_degree", "pagerank", "eigenvector"])
def test_the_consensus_of_no_rationales_is_empty_and_of_one_is_zero(centrality):
    for counts in ([], [1], [1, 1]):
        ragged = Ragged.build(
            sequence_lengths=[2] * len(counts), prompt_lengths=[1] * len(counts), rationales_per_question=counts
        )
        vectors = torch.randn(len(counts), 2, 4)
        assert question_consensus(vectors, vectors, ragged, centrality=centrality).tolist() == [0.0] * len(counts)


def test_eigenvector_centrality_holds_where_rows_saturate():
    query, key, ragged = projections(34, 1, scale=2.0)
    affinity, _ = question_affinity(query, key, ragged)
    scores = question_consensus(query, key, ragged, centrality="eigenvector").split(COUNTS)
    for a, x in zip(affinity, scores):
        if len(x) == 1:
            continue
        edges = a[: len(x), : len(x)].clone().fill_diagonal_(0)
        image = edges.T @ x
        assert edges.max() < 1 and (x > 0).all()
        close(image / image.norm(), x / x.norm(), atol=1e-8)


# ---- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options"),
    [
        (r"rule.*weights", {"rule": CompatibilityRule(), "weights": torch.ones(6)}),
        (r"weights.*\(4,\).*6", {"weights": torch.ones(4)}),
        (r"consensus.*not given", {"consensus": None}),
        (r"consensus.*\(4,\).*6", {"consensus": torch.ones(4)}),
        (r"difficulty_reference.*\(6, 1\).*6", {"difficulty_reference": torch.ones(6, 1)}),
        (r"sft_reduction.*'avg'", {"sft_reduction": "avg"}),
        (r"divergence.*'js'", {"divergence": "js"}),
        (r"divergence_normalizer", {"sft_reduction": "token", "normalizer": 0.1, "divergence_weight": 0.1}),
        (r"the rule.*\(1,\).*6", {"rule": lambda statistics: torch.ones(1)}),
        (r"bias.*\(5,\).*23", {"bias": torch.ones(5)}),
        (r"hidden.*\(3, 7\)", {"hidden": torch.zeros(3, 7)}),
        (r"head_weight.*\(23, 6\).*7", {"head_weight": torch.zeros(23, 6)}),
        (r"targets.*3", {"targets": torch.zeros(3, dtype=torch.int64)}),
    ],
)
def test_a_bad_argument_of_the_loss_is_named(message, options):
    _, batch, _ = make(seed=35, counts=(4, 2))
    good: dict[str, Any] = {
        "hidden": batch.hidden.detach().float(),
        "head_weight": torch.zeros(23, 7),
        "targets": batch.targets,
        "ragged": batch.ragged,
        "consensus": torch.zeros(6),
    }
    compatibility_loss(**good)
    with pytest.raises(ValueError, match=message):
        compatibility_loss(**good | options)


@pytest.mark.parametrize("options", [{"span": "answer"}, {"length_norm": "sqrt"}])
def test_a_bad_option_of_adaptability_is_named(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        AdaptabilityOptions(**options)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (r"targets.*\(3,\).*\(2, 7\)", lambda h, w, t, r: linear_logprob(h[:2], w, t[:3])),
        (r"head_weight.*\(23, 6\).*7", lambda h, w, t, r: linear_logprob(h, w[:, :6], t)),
        (r"bias.*\(5,\).*23", lambda h, w, t, r: linear_logprob(h, w, t, bias=w.new_zeros(5))),
        (r"hidden.*\(2, 7\)", lambda h, w, t, r: linear_token_stats(h[:2], w, t, r)),
        (r"head_weight.*\(23, 6\).*7", lambda h, w, t, r: linear_token_stats(h, w[:, :6], t, r)),
        (r"targets.*2", lambda h, w, t, r: linear_token_stats(h, w, t[:2], r)),
        (r"kind.*'js'", lambda h, w, t, r: answer_divergence(h, w, r, w.new_ones(6), kind="js")),  # type: ignore[arg-type]
        (r"alpha.*\(5,\).*6", lambda h, w, t, r: answer_divergence(h, w, r, w.new_ones(5))),
        (r"hidden.*\(2, 7\)", lambda h, w, t, r: answer_divergence(h[:2], w, r, w.new_ones(6))),
        (r"centrality.*'degree'", lambda h, w, t, r: question_consensus(h[:6], h[:6], r, centrality="degree")),  # type: ignore[arg-type]  # noqa: E501
        (r"query.*\(5, 7\).*6", lambda h, w, t, r: question_consensus(h[:5], h[:5], r)),
        (r"key.*\(6, 6\)", lambda h, w, t, r: question_consensus(h[:6], h[:6, :6], r)),
    ],
)
def test_a_bad_argument_of_the_other_ops_is_named(message, call):
    _, batch, head = make(seed=36, counts=(4, 2))
    with pytest.raises(ValueError, match=message):
        call(batch.hidden.detach(), head.weight.detach(), batch.targets, batch.ragged)
