"""What the ops say of arguments that do not fit, are no tensors or no numbers, and what debugging finds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from compact_kernels import (
    AdaptabilityOptions,
    CompatibilityRule,
    Ragged,
    answer_divergence,
    arguments,
    compatibility_loss,
    linear_logprob,
)
from tests.head_cases import poison_fresh_memory


@pytest.fixture(autouse=True)
def poison(monkeypatch) -> None:
    poison_fresh_memory(monkeypatch)


def test_a_rationale_without_a_scored_row_is_nothing_for_a_rule():
    labels = torch.tensor([-100, 1, 2, -100, -100, -100, 3, 4])
    ragged = Ragged.from_labels(labels, torch.tensor([0, 3, 5, 8]), torch.tensor([0, 2, 3]))
    hidden, weight = torch.randn(8, 6), torch.randn(9, 6)
    rule = CompatibilityRule(consensus=0, adaptability=0)
    with pytest.raises(ValueError, match="rationale 1 of the batch has no scored row"):
        compatibility_loss(hidden, weight, labels.roll(-1), ragged, rule=rule)
    weighed = compatibility_loss(hidden, weight, labels.roll(-1), ragged, weights=torch.tensor([0.5, 0.5, 1.0]))
    assert weighed.loss.isfinite()
    with pytest.raises(ValueError, match="weights is a list; it is a tensor"):
        compatibility_loss(hidden, weight, labels.roll(-1), ragged, weights=[0.5, 0.5, 1.0])


def test_what_is_no_tensor_is_named():
    ragged = Ragged.build(sequence_lengths=[3], prompt_lengths=[1], rationales_per_question=[1])
    given = {"hidden": torch.randn(3, 4), "head_weight": torch.randn(5, 4), "targets": torch.zeros(3).long()}
    for name in given:
        with pytest.raises(ValueError, match=f"{name} is a list; it is a tensor"):
            compatibility_loss(**given | {name: [1.0]}, ragged=ragged, weights=torch.ones(1))
        with pytest.raises(ValueError, match=f"{name} is a list; it is a tensor"):
            linear_logprob(**given | {name: [1.0]})
    with pytest.raises(ValueError, match="head_weight is a Linear; it is a tensor; of a module, its weight"):
        linear_logprob(**given | {"head_weight": torch.nn.Linear(4, 5)})
    with pytest.raises(ValueError, match="ragged is a dict; it is a compact_kernels.Ragged"):
        compatibility_loss(**given, ragged={}, weights=torch.ones(1))
    for gave, said in ((0.5, "the rule gave a float; α is a tensor"), (torch.ones(2), r"α of shape \(2,\) for 1 rat")):
        with pytest.raises(ValueError, match=said):
            compatibility_loss(**given, ragged=ragged, rule=lambda statistics, gave=gave: gave)
    for changed, said in (
        ({"normalizer": np.float32(-1)}, "normalizer is -1.0; it must be above 0"),
        ({"normalizer": torch.tensor(1j)}, "normalizer has .*complex64; it is one real number"),
        ({"weights": torch.ones(1) * 1j}, "weights has dtype torch.complex64; real numbers"),
        ({"adaptability": {}}, r"adaptability is \{\}; it is AdaptabilityOptions"),
        ({"head_weight": torch.zeros(0, 4)}, r"head_weight has shape \(0, 4\)"),
    ):
        with pytest.raises(ValueError, match=said):
            compatibility_loss(**given | {"ragged": ragged, "weights": torch.ones(1)} | changed)
    for wrong in ({"epsilon": -1.0}, {"epsilon": float("nan")}):
        with pytest.raises(ValueError, match="adaptability epsilon is .*; it is 0 … 1"):
            AdaptabilityOptions(**wrong)
    with pytest.raises(ValueError, match="the rule's difficulty is nan; it is a finite number"):
        CompatibilityRule(difficulty=float("nan"))
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(ValueError, match="hidden is torch.float64, head_weight"),
    ):
        linear_logprob(**given | {"hidden": given["hidden"].double()})
    with pytest.raises(ValueError, match="labels is torch.bool; it is a tensor of whole numbers"):
        Ragged.from_labels(torch.ones(3).bool(), torch.tensor([0, 3]), torch.tensor([0, 1]))


def test_debugging_finds_what_is_not_finite_or_negative(monkeypatch):
    monkeypatch.setattr(arguments, "DEBUG", True)
    ragged = Ragged.build(
        sequence_lengths=[3, 3], prompt_lengths=[1, 1], rationales_per_question=[2], answer_spans=[(0, 1)] * 2
    )
    hidden, weight, ones = torch.randn(6, 4), torch.randn(5, 4), torch.ones(2)
    targets = torch.zeros(6).long()
    for changed, said in (
        ({"hidden": hidden * math.nan}, r"hidden is not finite in rows \[0, 1"),
        ({"head_weight": weight.where(weight != weight[2, 1], math.nan)}, r"head_weight is not finite at \[2, 1\]"),
        ({"bias": torch.tensor([0, math.nan, 0, 0, 0])}, r"bias is not finite at \[1\]"),
        ({"bias": torch.tensor([-math.inf, 0, math.inf, 0, 0])}, r"bias is not finite at \[2\]"),
    ):
        given = {"hidden": hidden, "head_weight": weight} | changed
        with pytest.raises(ValueError, match=said):
            compatibility_loss(**given, targets=targets, ragged=ragged, weights=ones)
        with pytest.raises(ValueError, match=said):
            answer_divergence(**given, ragged=ragged, alpha=ones)
    for wrong, said in (({"weights": -ones}, "weights is"), ({"normalizer": torch.tensor(-1.0)}, "normalizer is")):
        with pytest.raises(ValueError, match=said):
            compatibility_loss(hidden, weight, targets, ragged, **{"weights": ones} | wrong)
    with pytest.raises(ValueError, match="difficulty_reference is"):
        rule = CompatibilityRule(consensus=0)
        compatibility_loss(hidden, weight, targets, ragged, rule=rule, difficulty_reference=0 * ones)
    with pytest.raises(ValueError, match="alpha is"):
        answer_divergence(hidden, weight, ragged, -ones)
    forbidden = torch.tensor([-math.inf, 0, 0, 0, 0])
    assert compatibility_loss(hidden, weight, targets + 1, ragged, weights=ones, bias=forbidden).loss.isfinite()
    op = torch.compile(compatibility_loss, backend="aot_eager", fullgraph=True)
    assert op(hidden, weight, targets, ragged, weights=ones, divergence_weight=0.1).loss.isfinite()
