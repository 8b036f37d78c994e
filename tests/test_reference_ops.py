"""linear_logprob and the consensus against loops and networkx; every function's bad arguments, named."""

from __future__ import annotations

from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

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
from tests.reference_cases import COUNTS, close, make

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
