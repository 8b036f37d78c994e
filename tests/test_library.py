"""The ops in a graph: torch.library's own checks, torch.compile against eager, and what must not be differentiated."""

from __future__ import annotations

import pytest
import torch

from compact_kernels import (
    CompatibilityRule,
    Ragged,
    answer_divergence,
    compatibility_loss,
    linear_logprob,
    linear_token_stats,
    question_consensus,
)
from tests import brute_force as loops

HEAD = {"plain": [1.0, 0.0, 1.0], "capped": [1.5, 3.0, 0.7]}


def tensors(kind: str = "bias", dtype: torch.dtype = torch.float32):
    batch = loops.pack(loops.random_questions(0, (3, 1, 2)))
    head = loops.random_head(torch.Generator().manual_seed(0), kind)
    hidden, *leaves = (t.detach().to(dtype).requires_grad_() for t in (batch.hidden, *head.leaves()))
    options = {name: value for name, value in head.options.items() if name != "bias"}
    return batch, hidden, leaves[0], leaves[1] if len(leaves) > 1 else None, options


def weighted_arguments(numbers: list[float], **changes):
    batch, hidden, weight, bias, _ = tensors()
    arguments = {
        "hidden": hidden,
        "weight": weight,
        "bias": bias,
        "targets": batch.targets[batch.ragged.rows],
        "shape": batch.ragged.tensors(),
        "host": batch.ragged.host.tensors(),
        "weights": None,
        "consensus": batch.consensus.float(),
        "difficulty_reference": None,
        "normalizer": None,
        "divergence_normalizer": None,
        "head": numbers,
        "rule": [1.0, 1.0, 1.0, 1.0, 0.1, 0.3],
        "names": "body none kl mean",
        "ignore_index": -100,
        "workspace_mib": 1,
        "dtype": torch.float32,
        "wanted": [True, True, bias is not None],
    }
    return tuple((arguments | changes).values())


@pytest.mark.parametrize("numbers", HEAD.values(), ids=HEAD)
def test_the_weighted_loss_passes_opcheck(numbers):
    torch.library.opcheck(torch.ops.compact_kernels.weighted_loss.default, weighted_arguments(numbers))


def test_the_weighted_loss_passes_opcheck_with_a_frozen_head_and_given_weights():
    changes = {"weights": torch.rand(6), "consensus": None, "wanted": [True, False, False]}
    arguments = list(weighted_arguments(HEAD["plain"], **changes))
    arguments[1], arguments[2] = arguments[1].detach(), arguments[2].detach()
    torch.library.opcheck(torch.ops.compact_kernels.weighted_loss.default, tuple(arguments))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("evidence", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_the_token_logprobs_pass_opcheck(keep, evidence, transposed):
    batch, hidden, weight, bias, _ = tensors()
    rows = hidden[batch.ragged.rows].detach()
    if transposed:
        rows, weight = (leaf.detach().t().contiguous().t() for leaf in (rows, weight))
    rows, weight = rows.requires_grad_(), weight.requires_grad_()
    if keep:
        weight, bias = weight.detach(), bias.detach()
    shape, host = (batch.ragged.tensors(), batch.ragged.host.tensors()) if evidence else ([], [])
    targets = batch.targets[batch.ragged.rows]
    arguments = (rows, weight, bias, targets, shape, host, HEAD["capped"], -100, 1, torch.float32, keep)
    torch.library.opcheck(torch.ops.compact_kernels.token_logprobs.default, arguments)


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_divergence_and_consensus_pass_opcheck(kind):
    batch, hidden, weight, bias, _ = tensors()
    shape, host = batch.ragged.tensors(), batch.ragged.host.tensors()
    alpha = torch.rand(batch.ragged.num_sequences)
    arguments = (hidden, weight, bias, alpha, shape, host, kind, HEAD["capped"], 1, torch.float32)
    torch.library.opcheck(torch.ops.compact_kernels.answer_divergence.default, arguments)
    query, key = torch.randn(2, batch.ragged.num_sequences, 2, 8)
    consensus = torch.ops.compact_kernels.question_consensus.default
    torch.library.opcheck(consensus, (query, key, shape, host, 1.0, "in_degree"))


def callable_rule(statistics):
    return CompatibilityRule()(statistics)


LOSSES = {
    "rule": {},
    "divergence": {"divergence_weight": 0.3},
    "token reduction": {"sft_reduction": "token", "normalizer": 0.2, "divergence_normalizer": 0.1},
    "callable": {"rule": callable_rule, "divergence_weight": 0.2},
}


@pytest.mark.parametrize("kind", ["plain", "bias", "capped"])
@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_a_compiled_loss_is_the_eager_one(options, kind):
    batch, hidden, weight, bias, numbers = tensors(kind)
    leaves = [leaf for leaf in (hidden, weight, bias) if leaf is not None]

    def loss(hidden, weight, bias):
        consensus = batch.consensus.float()
        output = compatibility_loss(
            hidden, weight, batch.targets, batch.ragged, bias=bias, consensus=consensus, **numbers, **options
        )
        return output.loss, output.alpha, output.statistics.tokens.entropy, output.divergence

    eager = loss(hidden, weight, bias)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(hidden, weight, bias)
    for actual, expected in zip(compiled, eager):
        torch.testing.assert_close(actual, expected)
    wanted = torch.autograd.grad(1.7 * eager[0], leaves)
    for actual, expected in zip(torch.autograd.grad(1.7 * compiled[0], leaves), wanted):
        torch.testing.assert_close(actual, expected)


def test_a_compiled_loss_refuses_a_rationale_without_a_scored_row():
    labels, offsets = torch.tensor([-100, 1, 2, -100, -100, -100]), torch.tensor([0, 3, 6])
    ragged = Ragged.from_labels(labels, offsets, torch.tensor([0, 2]))
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)

    def loss(hidden):
        return compatibility_loss(
            hidden, weight, torch.ones(6, dtype=torch.int64), ragged, rule=CompatibilityRule(consensus=0)
        ).loss

    torch._dynamo.reset()
    for op in (loss, torch.compile(loss, backend="aot_eager")):
        with pytest.raises(Exception, match="no scored row|without a scored row"):
            op(hidden)


def test_one_graph_serves_batches_of_other_shapes():
    batches = [
        loops.pack(loops.random_questions(seed, counts)) for seed, counts in enumerate([(3, 1), (2, 4, 1), (2,)])
    ]
    weight = torch.randn(23, 7)
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    def statistics(hidden, targets, ragged):
        return linear_token_stats(hidden, weight, targets, ragged).entropy

    torch._dynamo.reset()
    compiled = torch.compile(statistics, fullgraph=True, backend=backend, dynamic=True)
    for batch in batches:
        hidden = batch.hidden.detach().float()
        expected = statistics(hidden, batch.targets, batch.ragged)
        torch.testing.assert_close(compiled(hidden, batch.targets, batch.ragged), expected)
    assert len(graphs) <= 2  # one for every shape, and one if a size was taken for a constant at first


def test_a_compiled_frozen_head_keeps_the_gradients_of_its_rows():
    batch, hidden, weight, _, _ = tensors("plain")
    weight = weight.detach()

    def loss(hidden):
        consensus = batch.consensus.float()
        rule = callable_rule
        return compatibility_loss(hidden, weight, batch.targets, batch.ragged, consensus=consensus, rule=rule).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(hidden), hidden)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(hidden), hidden)[0], expected)


def test_a_compiled_loss_refuses_targets_of_another_length_and_keeps_a_number_s_digits():
    batch, hidden, weight, _, _ = tensors("plain", torch.float64)

    def loss(hidden, targets):
        weights = torch.ones(batch.ragged.num_sequences, dtype=torch.float64)
        return compatibility_loss(hidden, weight, targets, batch.ragged, weights=weights, normalizer=0.1).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(hidden, batch.targets), loss(hidden, batch.targets), rtol=1e-13, atol=0)
    for targets in (torch.cat([batch.targets, batch.targets]), batch.targets[:3]):
        with pytest.raises(Exception, match="one target a row"):
            compiled(hidden, targets)


def test_compiled_logprobs_take_any_upstream_gradient():
    batch, hidden, weight, bias, _ = tensors()

    def weighed(hidden, weight, bias):
        logprob, entropy = linear_logprob(hidden, weight, batch.targets, bias=bias)
        steps = torch.arange(len(logprob)) / len(logprob)
        return (steps * logprob).sum() + (steps.square() * entropy).sum()

    torch._dynamo.reset()
    compiled = torch.compile(weighed, fullgraph=True, backend="aot_eager")
    leaves = [hidden, weight, bias]
    expected = torch.autograd.grad(weighed(*leaves), leaves)
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected):
        torch.testing.assert_close(actual, wanted)


def test_compiled_divergence_and_consensus_are_the_eager_ones():
    batch, hidden, weight, bias, _ = tensors()
    alpha, (query, key) = torch.rand(batch.ragged.num_sequences), torch.randn(2, batch.ragged.num_sequences, 2, 8)

    def both(hidden, query, key):
        divergence = answer_divergence(hidden, weight, batch.ragged, alpha, bias=bias)
        return divergence, question_consensus(query, key, batch.ragged)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(hidden, query, key)
    for actual, expected in zip(compiled, both(hidden, query, key)):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("op", ["compatibility_loss", "linear_logprob", "answer_divergence"])
def test_a_second_derivative_is_refused(op):
    batch, hidden, weight, bias, _ = tensors()
    if op == "compatibility_loss":
        rule = CompatibilityRule(consensus=0)
        value = compatibility_loss(hidden, weight, batch.targets, batch.ragged, bias=bias, rule=rule).loss
    elif op == "linear_logprob":
        value = linear_logprob(hidden, weight, batch.targets, bias=bias)[0].sum()
    else:
        alpha = torch.ones(batch.ragged.num_sequences)
        value = answer_divergence(hidden, weight, batch.ragged, alpha, bias=bias).sum()
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(value, hidden, create_graph=True)


def test_ragged_survives_being_taken_apart():
    ragged = loops.pack(loops.random_questions(1, (3, 2))).ragged
    again = Ragged.of_tensors(ragged.tensors(), ragged.host.tensors())
    for actual, expected in zip(again.tensors(), ragged.tensors()):
        assert torch.equal(actual, expected)
