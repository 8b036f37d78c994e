"""compatibility_loss against the method in loops, in float64: values, gradients, what is detached, invariances."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityRule,
    Ragged,
    answer_divergence,
    compatibility_loss,
    linear_token_stats,
)
from tests import brute_force as loops
from tests.reference_cases import close, gradients, make, run

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
