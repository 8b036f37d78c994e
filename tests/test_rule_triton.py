"""The one-launch rule against the plain one: metrics, α and row weights, on the GPU or in Triton's interpreter."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from compact_kernels import AdaptabilityOptions, CompatibilityRule, Ragged, Statistics, TokenStatistics
from compact_kernels.rule import segment_sum, sequence_adaptability
from tests.head_cases import use_native_cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COUNTS = (3, 1, 5, 2)
LONGEST = 700 if DEVICE == "cuda" else 90
IGNORED = -100


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def launch(request, triton_kernels, monkeypatch) -> None:
    """Who decides: Triton, or the native library where there is a GPU."""
    if request.param == "cuda":
        use_native_cuda(monkeypatch, "rule_triton", "decide")


def make(counts: tuple[int, ...] = COUNTS, seed: int = 0, longest: int = LONGEST) -> tuple[Ragged, dict[str, Any]]:
    """A batch of ragged rationales on the device, and the token statistics of its rows."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    completions = [rng.choice((1, 2, 31, 33, rng.randint(3, longest), longest)) for _ in range(sum(counts))]
    prompts = [rng.randint(1, 4) for _ in completions]
    ragged = Ragged.build(
        sequence_lengths=[p + c for p, c in zip(prompts, completions)],
        prompt_lengths=prompts,
        rationales_per_question=counts,
        body_lengths=[rng.choice((0, c, rng.randint(0, c))) for c in completions],
        thinking=[[rng.random() < 0.3 for _ in range(c)] for c in completions],
    )
    targets = torch.randint(50, (ragged.num_rows,), generator=generator)
    targets[torch.rand(ragged.num_rows, generator=generator) < 0.2] = IGNORED
    targets[ragged.cu_rows[-2] : ragged.cu_rows[-1]] = IGNORED  # a rationale without any target
    logprob = -torch.rand(ragged.num_rows, generator=generator) * 3
    tensors = {
        "logprob": logprob.where(targets != IGNORED, 0.0),
        "evidence": torch.randn(ragged.num_rows, generator=generator) - 4,
        "targets": targets,
        "consensus": torch.rand(ragged.num_sequences, generator=generator),
        "difficulty_reference": torch.rand(ragged.num_sequences, generator=generator) + 0.5,
        "weights": torch.rand(ragged.num_sequences, generator=generator),
    }
    return ragged.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in tensors.items()}


def expected(ragged: Ragged, tensors: dict[str, Any], **options: Any) -> tuple[torch.Tensor, ...]:
    """What `compatibility_loss` computes, from the functions of the plain rule, in float64."""
    host, tensors = ragged.to("cpu"), {name: t.cpu().double() for name, t in tensors.items() if t is not None}
    counted = tensors["targets"] != IGNORED
    per_rationale = segment_sum(counted.double(), host.cu_rows)
    loss = -segment_sum(tensors["logprob"], host.cu_rows) / per_rationale.clamp_min(1)
    if options.get("difficulty_reference") is not None:
        loss = loss / tensors["difficulty_reference"]
    consensus = torch.zeros_like(loss) if options.get("consensus") is None else tensors["consensus"]
    adaptability = sequence_adaptability(tensors["evidence"], host, options.get("adaptability", AdaptabilityOptions()))
    tokens = TokenStatistics(tensors["logprob"], tensors["logprob"], tensors["evidence"], tensors["logprob"])
    statistics = Statistics(host, tokens, adaptability, consensus, loss, per_rationale)
    alpha = options.get("rule", CompatibilityRule())(statistics)
    if options.get("weights") is not None:
        alpha = tensors["weights"]
    weight = alpha * options.get("normalizer", 0.25)
    if options.get("divide_by_targets", True):
        weight = weight / per_rationale.clamp_min(1)
    return alpha, adaptability, loss, per_rationale, weight[host.sequence_of_row]


def run(ragged: Ragged, tensors: dict[str, Any], chunks: list[tuple[int, int]] | None = None, **options: Any) -> Any:
    from compact_kernels.rule_triton import Decision, decide

    out = Decision(*(tensor.fill_(float("nan")) for tensor in Decision.empty(ragged)))
    poisoned = tensors["logprob"].where(tensors["targets"] != IGNORED, float("nan"))  # ignored rows are not looked at
    for first, last in chunks or [(0, ragged.num_questions)]:
        decide(
            first,
            last,
            ragged,
            poisoned,
            tensors["evidence"],
            tensors["targets"],
            rule=options.get("rule", CompatibilityRule()),
            options=options.get("adaptability", AdaptabilityOptions()),
            consensus=options.get("consensus"),
            difficulty_reference=options.get("difficulty_reference"),
            normalizer=torch.tensor(options.get("normalizer", 0.25), device=DEVICE),
            divide_by_targets=options.get("divide_by_targets", True),
            ignore_index=IGNORED,
            weights=options.get("weights"),
            out=out,
        )
    return out


def check(ragged: Ragged, tensors: dict[str, Any], **options: Any) -> None:
    chunks = options.pop("chunks", None)
    for name, actual, wanted in zip(
        ("alpha", "adaptability", "difficulty", "targets", "row_weight"),
        run(ragged, tensors, chunks, **options),
        expected(ragged, tensors, **options),
    ):
        difference = (actual.double().cpu() - wanted).abs()
        assert bool((difference <= 1e-6 + 2e-5 * wanted.abs()).all()), (name, actual, wanted)


@pytest.mark.parametrize("divide_by_targets", [True, False])
@pytest.mark.parametrize("names", [(), ("consensus",), ("consensus", "difficulty_reference"), ("weights",)])
def test_metrics_weights_and_row_weights_are_those_of_the_plain_rule(names, divide_by_targets):
    ragged, tensors = make(seed=len(names))
    check(ragged, tensors, divide_by_targets=divide_by_targets, **{name: tensors[name] for name in names})


@pytest.mark.parametrize("span", ["body", "all"])
@pytest.mark.parametrize("length_norm", ["none", "mean"])
@pytest.mark.parametrize("epsilon", [0.1, 0.0])
def test_every_option_of_eq_3(span, length_norm, epsilon):
    ragged, tensors = make(seed=5)
    check(ragged, tensors, adaptability=AdaptabilityOptions(epsilon, span, length_norm))


@pytest.mark.parametrize("rule", [(2.0, 0.5, 1.0, 0.7), (0.0, 1.0, 0.0, 1.0), (1.0, 0.0, 3.0, 2.0)])
def test_every_weight_and_the_temperature_of_eq_7(rule):
    ragged, tensors = make(seed=6)
    check(ragged, tensors, rule=CompatibilityRule(*rule), consensus=tensors["consensus"])


@pytest.mark.parametrize("counts", [(1,), (1, 1, 2), (7, 3), (16,), (17, 2)])
def test_any_number_of_rationales(counts):
    ragged, tensors = make(counts + (3,), seed=7, longest=40)
    check(ragged, tensors, consensus=tensors["consensus"])


def test_a_chunk_of_questions_writes_its_own_entries_and_no_others():
    ragged, tensors = make(seed=8)
    check(ragged, tensors, chunks=[(0, 1), (3, 4), (1, 3)], consensus=tensors["consensus"])
    out = run(ragged, tensors, [(1, 3), (2, 2)])
    cu_rows, cu_questions = ragged.host.cu_rows.tolist(), ragged.host.cu_questions.tolist()
    written = torch.zeros(ragged.num_sequences, dtype=torch.bool)
    written[cu_questions[1] : cu_questions[3]] = True
    rows = torch.zeros(ragged.num_rows, dtype=torch.bool)
    rows[cu_rows[cu_questions[1]] : cu_rows[cu_questions[3]]] = True
    for tensor in out[:4]:
        assert torch.equal(tensor.isfinite().cpu(), written)
    assert torch.equal(out.row_weight.isfinite().cpu(), rows)


def test_a_metric_without_spread_says_nothing_however_large_it_is():
    ragged, tensors = make(seed=9)
    tensors["consensus"] = torch.full_like(tensors["consensus"], 1e4).add_(1e-3 * tensors["consensus"])
    check(ragged, tensors, consensus=tensors["consensus"])


def test_a_spread_far_below_the_mean_is_centred_twice():
    ragged, tensors = make((2,), seed=10)
    tensors["consensus"] = torch.tensor([1000.0, 1000.0078125], device=DEVICE)
    out = run(ragged, tensors, rule=CompatibilityRule(0, 1, 0), consensus=tensors["consensus"])
    wanted = torch.softmax(torch.tensor([-1.0, 1.0]), 0)
    torch.testing.assert_close(out.alpha.cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_an_infinite_metric_that_nobody_weighs_does_no_harm():
    ragged, tensors = make(seed=11)
    tensors["evidence"] = tensors["evidence"].clone()
    tensors["evidence"][1::3] = -float("inf")  # a forbidden answer token
    out = run(ragged, tensors, rule=CompatibilityRule(0, 1, 1), consensus=tensors["consensus"])
    finite = dict(tensors, evidence=torch.zeros_like(tensors["evidence"]))
    wanted = expected(ragged, finite, rule=CompatibilityRule(0, 1, 1), consensus=tensors["consensus"])
    torch.testing.assert_close(out.alpha.double().cpu(), wanted[0], rtol=2e-5, atol=1e-6)


def test_rationales_without_rows_have_metrics_of_zero():
    labels = torch.full((12,), IGNORED)
    labels[[1, 2, 7, 8]] = 3  # the second rationale has no target, hence no scored row
    ragged = Ragged.from_labels(labels, torch.tensor([0, 4, 6, 10, 12]), torch.tensor([0, 3, 4])).to(DEVICE)
    assert ragged.host.cu_rows.diff().tolist() == [2, 0, 2, 0]
    count = ragged.num_rows
    tensors = {
        "logprob": -torch.arange(1.0, count + 1, device=DEVICE),
        "evidence": torch.randn(count, device=DEVICE),
        "targets": torch.full((count,), 3, device=DEVICE),
        "consensus": torch.rand(4, device=DEVICE),
    }
    check(ragged, tensors, consensus=tensors["consensus"])


def test_two_launches_agree_to_the_last_bit():
    ragged, tensors = make(seed=12)
    for one, other in zip(run(ragged, tensors), run(ragged, tensors)):
        assert torch.equal(one, other)
