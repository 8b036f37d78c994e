"""Norms and the fused loss, in float64: its ways to weights, norms before weights, and terms that mix rationales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compact_kernels import (
    CompatibilityRule,
    Ragged,
    SampleGradNorms,
    answer_divergence,
    compatibility_loss,
    linear_logprob,
    sample_grad_norms,
)
from tests.architectures import token_ids
from tests.norm_cases import batch, fused, recorded, row_losses, student, truth
from tests.student_cases import gradients


@pytest.mark.parametrize("workspace", [1, 0])
@pytest.mark.parametrize("rule", ["compact", "own"])
def test_every_way_through_the_fused_head_gives_its_norms(rule, workspace):
    model = student("gpt2")
    ids, targets, ragged = batch((70, 33, 90, 64, 2), (5, 1, 30, 2, 1))
    plain = CompatibilityRule(consensus=0)
    options = {
        "weights": None, "rule": plain if rule == "compact" else lambda statistics: plain(statistics),
        "workspace_mib": workspace,
    }  # fmt: skip
    with torch.no_grad():
        output = model(input_ids=ids, compact=ragged)
        alpha = compatibility_loss(output.hidden, output.head.weight, targets, ragged, rule=plain).alpha
    counts = ragged.cu_rows.diff()
    weights = (alpha / counts / ragged.num_questions).repeat_interleave(counts)
    expected = truth(model, ids, targets, ragged, weights)
    found = recorded(model, lambda: fused(model, ids, targets, ragged, **options), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_a_rationale_that_weighs_nothing_is_not_measured():
    model = student("llama", lora=True)
    ids, targets, ragged = batch()
    alpha = torch.tensor([1.0, 0.0, 0.25, 0.75]).double()
    with sample_grad_norms(model, ragged) as norms:
        fused(model, ids, targets, ragged, weights=alpha).backward()
    assert norms.norms[1] == 0 and norms.norms[[0, 2, 3]].min() > 0
    unweighted = norms.per_weight(alpha / ragged.num_questions)
    assert unweighted.isnan().tolist() == [False, True, False, False]
    ones = torch.ones(4).double()
    with sample_grad_norms(model, ragged) as norms:
        fused(model, ids, targets, ragged, weights=ones, normalizer=1.0).backward()
    torch.testing.assert_close(unweighted[[0, 2, 3]], norms.norms[[0, 2, 3]], rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("lora", [False, True])
def test_unweighted_norms_leave_the_gradients_weighted_and_measure_what_weighs_nothing(name, lora):
    model = student(name, lora)
    model.get_output_embeddings().weight.requires_grad_(False)
    ids, targets, ragged = batch()
    alpha, counts = torch.tensor([1.0, 0.0, 0.25, 0.75]).double(), ragged.cu_rows.diff()
    options = {"weights": alpha, "normalizer": 0.3}
    expected = truth(model, ids, targets, ragged, (1 / counts.double()).repeat_interleave(counts))
    plain = fused(model, ids, targets, ragged, **options)
    plain.backward()
    ordinary = gradients(model)
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with sample_grad_norms(model, ragged, norms="unweighted") as norms:
            loss = fused(model, ids, targets, ragged, **options)
            loss.backward()
        torch.testing.assert_close(loss, plain)
        torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)
        torch.testing.assert_close(norms.weights, alpha * 0.3)
        noise = 1e-12 if name == "gpt2" else 2e-7  # the others normalise in float32
        torch.testing.assert_close(gradients(model), ordinary, rtol=1e-6, atol=noise)
    with sample_grad_norms(model, ragged, norms="unweighted"), pytest.raises(ValueError, match="divergence mixes"):
        fused(model, ids, targets, ragged, divergence_weight=0.1, **options)


def test_unweighted_norms_refuse_a_loss_beside_the_first_which_its_weights_would_weigh():
    model = student("llama", lora=True)
    ids, targets, ragged = batch()
    alpha = torch.tensor([1.0, 0.5, 0.25, 0.75]).double()
    output = model(input_ids=ids, compact=ragged)
    for name, beside in {
        "linear_logprob": lambda hidden, head: linear_logprob(hidden, head, targets)[0].sum(),
        "a second compatibility_loss": lambda hidden, head: (
            compatibility_loss(hidden, head, targets, ragged, weights=alpha).loss
        ),
        "answer_divergence": lambda hidden, head: answer_divergence(hidden, head, ragged, alpha).sum(),
    }.items():
        with sample_grad_norms(model, ragged, norms="unweighted"):
            output = model(input_ids=ids, compact=ragged)
            compatibility_loss(output.hidden, output.head.weight, targets, ragged, weights=alpha)
            with pytest.raises(ValueError, match=f"unweighted norms: {name} in the same record"):
                beside(output.hidden, output.head.weight)
            linear_logprob(output.hidden.detach(), output.head.weight, targets)  # of which nothing flows back


@pytest.mark.parametrize("lengths", [((9, 5, 7, 8), (3, 2, 2, 3)), ((29,), (20,))])
def test_unweighted_norms_refuse_a_loss_of_another_batch(lengths):
    model = student("llama", lora=True)
    ids, targets, ragged = batch()
    _, _, other = batch(*lengths)
    output = model(input_ids=ids, compact=ragged)
    with sample_grad_norms(model, ragged, norms="unweighted"), pytest.raises(ValueError, match="of another batch"):
        weights = torch.ones(other.num_sequences).double()
        total = int(other.cu_seqlens[-1])
        hidden = output.hidden[:1].expand(total, -1)
        compatibility_loss(hidden, output.head.weight, targets[:1].expand(total), other, weights=weights)


def test_unweighted_norms_refuse_what_they_cannot_weigh_by_name():
    _, _, ragged = batch()
    with pytest.raises(ValueError, match=r"unweighted norms: lm_head\.weight trains"):
        SampleGradNorms(student("llama"), norms="unweighted")
    bias = student("qwen2").requires_grad_(False)
    bias.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"unweighted norms: model\.layers\.0\.self_attn\.q_proj\.bias trains"):
        SampleGradNorms(bias, norms="unweighted")
    with pytest.raises(ValueError, match="products is 'x'; it is auto, gram or own"):
        SampleGradNorms(student("llama", lora=True), products="x")
    removed = SampleGradNorms(model := student("llama", lora=True))
    removed.remove()
    with pytest.raises(RuntimeError, match="has been removed from its model"), removed.record(batch()[2]):
        model(input_ids=batch()[0])
    with pytest.raises(ValueError, match="unweighted norms are exact"):
        SampleGradNorms(student("llama", lora=True), norms="unweighted", method="hutchinson")
    model = student("llama", lora=True)
    ids, targets, ragged = batch()
    with sample_grad_norms(model, ragged, norms="unweighted") as norms:
        row_losses(model, ids, targets, ragged).sum().backward()
    with pytest.raises(RuntimeError, match="has to be compact_kernels.compatibility_loss"):
        norms.squared.sum()


MIXED = {
    "lora": ("llama", True, False), "head": ("llama", False, False), "capped": ("gemma2", False, False),
    "tied": ("gpt2", False, False), "masked": ("llama", False, True),
}  # fmt: skip


def mixed_batch(masked: bool) -> tuple[Tensor, Tensor, Ragged]:
    """Two questions, answer spans, one of them of a rationale whose answer has no target."""
    lengths, spans = (9, 7, 5, 6), [(5, 2), (3, 2), (2, 2), (3, 2)]
    ids = torch.cat(token_ids(*lengths), dim=1)
    ragged = Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * 4, rationales_per_question=[2, 2], answer_spans=spans
    )
    targets = F.pad(ids[0, 1:], (0, 1), value=-100)
    if masked:
        targets[ragged.rows[ragged.span_rows[:2]]] = -100
    return ids, targets, ragged


@pytest.mark.parametrize("rule", [False, True])
@pytest.mark.parametrize("case", MIXED)
def test_terms_that_mix_rationales_count_where_they_flow(case, rule):
    """With eq. 9 the norm is of the step's own gradient, split by the rationale it flows through."""
    name, lora, masked = MIXED[case]
    ids, targets, ragged = mixed_batch(masked)
    model = student(name, lora)
    alpha = torch.tensor([0.3, 0.7, 0.6, 0.4]).double()
    options = {"divergence_weight": 0.5, "normalizer": 0.8, "divergence_normalizer": 0.6}
    options |= {"rule": (lambda statistics: alpha) if rule else None, "weights": None if rule else alpha}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss_through(s: int) -> Tensor:
        """The other rationales' states, and their logits, held fixed."""
        output = model(input_ids=ids, compact=ragged)
        place = torch.arange(len(targets))
        inside = ((place >= ragged.cu_seqlens[s]) & (place < ragged.cu_seqlens[s + 1]))[:, None]
        logits = output.head(output.hidden)
        logits = torch.where(inside, logits, logits.detach())
        eye = torch.eye(logits.shape[1], dtype=logits.dtype)
        return compatibility_loss(logits, eye, targets, ragged, **options, implementation="reference").loss

    expected = []
    for s in range(4):
        grads = torch.autograd.grad(loss_through(s), list(parameters.values()), allow_unused=True)
        expected.append(sum(g.square().sum() for g in grads if g is not None))
    fused(model, ids, targets, ragged, **options).backward()
    ordinary = gradients(model)
    found = recorded(model, lambda: fused(model, ids, targets, ragged, **options), ragged)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-7, atol=0)
    torch.testing.assert_close(gradients(model), ordinary, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_trained_bf16_heads_norms_come_from_rows_of_either_dtype(name):
    """CPUs without products in bfloat16 hold the head's gradient rows in float32, beside hidden states in bfloat16."""
    ids, targets, ragged = mixed_batch(False)
    options = {"weights": torch.tensor([0.3, 0.7, 0.6, 0.4]), "divergence_weight": 0.5}
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        model = student(name, dtype=dtype)
        found[dtype] = recorded(model, lambda m=model: fused(m, ids, targets, ragged, **options), ragged).double()
    torch.testing.assert_close(found[torch.bfloat16], found[torch.float64], rtol=0.05, atol=0)


@pytest.mark.parametrize(("name", "divergence"), [("llama", 0.5), ("gpt2", 0.5), ("qwen2", 0.0)])
def test_a_whole_compiled_step_with_a_trained_head_gives_the_same_norms(name, divergence):
    model = student(name)
    ids, targets, ragged = mixed_batch(False)
    alpha = torch.tensor([0.3, 0.7, 0.6, 0.4]).double()

    def loss() -> Tensor:
        return fused(model, ids, targets, ragged, weights=alpha, divergence_weight=divergence)

    expected = recorded(model, loss, ragged)
    model.zero_grad()
    torch._dynamo.reset()
    found = recorded(model, torch.compile(loss, backend="aot_eager"), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch._dynamo.reset()


class Headed(nn.Module):
    """An embedding and a head with a bias, tied or not."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9)
        if tied:
            self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def loss(self, ids: Tensor, ragged: Ragged, targets: Tensor, **options: Any) -> Tensor:
        hidden = self.body(self.embed(ids)).tanh()
        options |= {"bias": self.lm_head.bias, "weights": hidden.new_tensor([0.4, 0.6]), "normalizer": 1.0}
        return compatibility_loss(hidden, self.lm_head.weight, targets, ragged, **options).loss


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_with_a_bias_gives_its_norms(tied):
    torch.manual_seed(0)
    model = Headed(tied).double()
    ids, targets = torch.tensor([1, 4, 4, 2, 1, 4, 8]), torch.tensor([4, 4, -100, 1, 4, 8, -100])
    ragged = Ragged.build(sequence_lengths=[3, 4], prompt_lengths=[1, 1], rationales_per_question=[2])
    expected = []
    for own in (slice(0, 3), slice(3, 7)):
        only = torch.full_like(targets, -100)
        only[own] = targets[own]
        model.zero_grad()
        model.loss(ids, ragged, only, implementation="reference").backward()
        expected.append(sum(p.grad.square().sum() for p in model.parameters()))
    with sample_grad_norms(model, ragged) as norms:
        model.loss(ids, ragged, targets).backward()
    torch.testing.assert_close(norms.squared, torch.stack(expected), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "made", [lambda w: 3 * w, lambda w: F.normalize(w, dim=-1), lambda w: nn.Parameter(w.detach())]
)
def test_a_head_that_is_made_of_the_models_or_is_another_is_refused(made):
    model, ids = Headed(False), torch.tensor([1, 4, 4])
    ragged = Ragged.build(sequence_lengths=[3], prompt_lengths=[1], rationales_per_question=[1])
    hidden, weight, bias, one = model.embed(ids), model.lm_head.weight, model.lm_head.bias, torch.ones(1)
    with sample_grad_norms(model, ragged):
        with pytest.raises(ValueError, match="is not that of the output layer"):
            compatibility_loss(hidden, made(weight), ids, ragged, weights=one, bias=bias)
        # Its values in another dtype are its own.
        compatibility_loss(hidden.double(), weight.double(), ids, ragged, weights=one, bias=bias.double())


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_rationale_without_a_target_takes_part_in_the_divergence_as_without_a_recorder(request, kernels):
    if kernels == "triton":
        request.getfixturevalue("triton_kernels")
    device = "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model, ids = Headed(False).to(device), torch.tensor([1, 4, 4, 2, 1, 8], device=device)
    targets = torch.tensor([1, 2, 3, -100, -100, -100], device=device)
    ragged = Ragged.build(
        sequence_lengths=[3, 3], prompt_lengths=[1, 1], rationales_per_question=[2], answer_spans=[(0, 1)] * 2
    ).to(device)
    model.loss(ids, ragged, targets, divergence_weight=0.5).backward()
    plain = gradients(model)
    model.zero_grad()
    with sample_grad_norms(model, ragged) as norms:
        model.loss(ids, ragged, targets, divergence_weight=0.5).backward()
    torch.testing.assert_close(gradients(model), plain)
    assert norms.norms.min() > 0


def test_log_probs_that_know_no_rationales_give_no_norms_of_a_head():
    model, ids = Headed(False), torch.tensor([1, 4, 4])
    ragged = Ragged.build(sequence_lengths=[3], prompt_lengths=[1], rationales_per_question=[1])
    with sample_grad_norms(model, ragged), pytest.raises(ValueError, match="linear_logprob gives no norms of a head"):
        linear_logprob(model.body(model.embed(ids)), model.lm_head.weight, ids)
