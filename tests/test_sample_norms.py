"""Per-rationale gradient norms: one backward pass against a backward pass for every rationale, in float64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from compact import compilation
from compact.attention import packed_rows
from compact.config import LoraConfig
from compact.student import add_lora, prepare
from compact_kernels import CompatibilityRule, Ragged, SampleGradNorms, compatibility_loss, sample_grad_norms
from compact_kernels.sample_norms import costs
from compact_kernels.sample_norms.segments import Segments
from tests.architectures import tiny, token_ids

LENGTHS = (7, 2, 12, 5)


def batch(lengths=LENGTHS, prompts=None) -> tuple[Tensor, Tensor, Ragged]:
    """Ids (1, T) with repeated tokens, targets (T,) and the shape; two questions."""
    ids = torch.cat(token_ids(*lengths), dim=1) % 11 + 3
    first = (len(lengths) + 1) // 2
    ragged = Ragged.build(
        sequence_lengths=lengths,
        prompt_lengths=[1] * len(lengths) if prompts is None else prompts,
        rationales_per_question=[first, len(lengths) - first] if len(lengths) > 1 else [1],
    )
    return ids, F.pad(ids[0, 1:], (0, 1), value=-100), ragged


def student(name: str, lora: bool = False, dtype: torch.dtype = torch.float64) -> nn.Module:
    model = tiny(name)
    model.set_attn_implementation("eager" if name == "gemma2" else "compact_varlen")
    prepare(model)
    if lora:
        model = add_lora(model, LoraConfig(rank=2, dropout=0.0))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.1)
    return nn.Module.to(model, dtype).train()


def row_losses(model: nn.Module, ids: Tensor, targets: Tensor, ragged: Ragged) -> Tensor:
    """(N,) through plain logits."""
    output = model(input_ids=ids, compact=ragged)
    logits = output.head(output.hidden[ragged.rows])
    return F.cross_entropy(logits, targets[ragged.rows], reduction="none")


def truth(model: nn.Module, ids: Tensor, targets: Tensor, ragged: Ragged, weights: Tensor) -> Tensor:
    """(S,) squared norms of Σ_rows weight·loss by one backward pass a rationale."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    cu, norms = ragged.cu_rows.tolist(), []
    for s in range(ragged.num_sequences):
        losses = row_losses(model, ids, targets, ragged)
        part = (losses * weights)[cu[s] : cu[s + 1]].sum()
        grads = torch.autograd.grad(part, parameters, allow_unused=True, materialize_grads=True)
        norms.append(sum(g.square().sum() for g in grads))
    return torch.stack(norms)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def uniform(ragged: Ragged) -> Tensor:
    """(N,) what a row weighs under α = 1/K and sft_reduction=mean."""
    counts, questions = ragged.cu_rows.diff(), ragged.cu_questions.diff()
    per = 1 / (counts * questions.repeat_interleave(questions) * ragged.num_questions).double()
    return per.repeat_interleave(counts)


def fused(model: nn.Module, ids: Tensor, targets: Tensor, ragged: Ragged, **options) -> Tensor:
    output = model(input_ids=ids, compact=ragged)
    if "weights" not in options:  # α = 1/K
        counts = ragged.cu_questions.diff()
        options["weights"] = (1 / counts.double()).repeat_interleave(counts)
    head = output.head
    return compatibility_loss(
        output.hidden, head.weight, targets, ragged, bias=head.bias, logit_scale=head.logit_scale,
        softcap=head.softcap, **options,
    ).loss  # fmt: skip


@pytest.mark.parametrize("products", ["gram", "own"])
@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", False), ("llama", True), ("qwen2", False), ("qwen3", False), ("gemma2", False), ("gemma3", False),
        ("gpt2", False), ("gpt2", True), ("gpt_neox", False), ("phi3", False),
    ],
)  # fmt: skip
def test_every_architectures_norms_are_those_of_a_backward_pass_per_rationale(name, lora, products):
    model = student(name, lora)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    fused(model, ids, targets, ragged).backward()
    ordinary = gradients(model)
    with sample_grad_norms(model, ragged, products=products) as norms:
        fused(model, ids, targets, ragged).backward()
    torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)  # the models normalise in float32
    torch.testing.assert_close(gradients(model), ordinary, rtol=1e-9, atol=1e-12)
    assert not any("forward" in vars(m) and "_sample_norms" in vars(m) for m in model.modules())


def recorded(model: nn.Module, step, ragged: Ragged, **options) -> Tensor:
    with sample_grad_norms(model, ragged, **options) as norms:
        step().backward()
    return norms.squared


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_norms_survive_both_gradient_checkpointings(lora, reentrant):
    model = student("qwen2", lora)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("name", "lora", "products", "stored"),
    [("qwen2", False, "gram", False), ("llama", True, "own", False), ("qwen2", False, "own", True)],
)
def test_compiled_layers_give_the_same_norms(monkeypatch, name, lora, products, stored):
    monkeypatch.setattr(costs, "stored", lambda *shape: stored)
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    model = student(name, lora)
    plain = copy.deepcopy(model)
    compilation.compile_layers(model)
    recorder = SampleGradNorms(model, products=products)
    for lengths in (LENGTHS, (3, 9), (8, 1 + 1, 5, 4, 6)):  # a graph serves batches of every shape
        ids, targets, ragged = batch(lengths)
        expected = truth(plain, ids, targets, ragged, uniform(ragged))
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged).backward()
        torch.testing.assert_close(norms.squared, expected, rtol=1e-7, atol=0)
    assert counters["stats"]["unique_graphs"] <= 4  # as without norms
    torch._dynamo.reset()


def cut(*lengths: int) -> Segments:
    offsets = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    return Segments.of(torch.tensor(offsets, dtype=torch.int32), offsets)


RAGGED = (1500, 2500, 1501, 2499, 2047, 2049, 4000, 288)  # tokens in all as eight of 2048


@pytest.mark.parametrize(
    ("lengths", "own", "stored"),  # of 896 → 2 × 4864; of weights of 4864, 896, 128 and 16 outputs
    [
        ((256,) * 32, False, [False, False, False, False]),
        ((512,) * 8, False, [False, False, False, False]),
        ((2048,) * 8, True, [True, True, False, False]),
        (RAGGED, True, [True, False, False, False]),  # one rationale's small product would leave a device idle
        ((2048,) * 40, True, [False, True, True, False]),  # 4864 outputs are 665 MiB
    ],
)
def test_long_rationales_have_their_products_stored_where_that_is_less_work(lengths, own, stored):
    segments = cut(*lengths)
    assert costs.own(896, [4864, 4864], segments) is own
    assert [costs.stored(896, outputs, segments) for outputs in (4864, 896, 128, 16)] == stored
    assert costs.own(896, [16], segments)


@pytest.mark.parametrize("products", ["auto", "own", "gram"])
def test_a_recorder_plans_each_batch_by_its_lengths(products):
    model = nn.Sequential(nn.Linear(896, 4864))
    recorder = SampleGradNorms(model, products=products)
    for lengths, own in (((2048,) * 8, True), ((256,) * 4, False), ((2048,) * 8, True)):
        ragged = Ragged.build(
            sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
        )
        with recorder.record(ragged):
            (family,) = recorder._families
            assert family.own is (own if products == "auto" else products == "own")
            assert family.stored == [own]


@pytest.mark.parametrize("name", ["gpt2"])
def test_a_whole_compiled_model_with_plain_cross_entropy_gives_the_same_norms(name):
    model = student(name)
    ids, targets, ragged = batch()
    weights = uniform(ragged)
    expected = truth(model, ids, targets, ragged, weights)
    torch._dynamo.reset()

    def loss() -> Tensor:
        cu = ragged.cu_seqlens
        mask = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 12, "max_length_k": 12}
        with packed_rows():
            hidden = model.base_model(ids, position_ids=positions, use_cache=False, **mask).last_hidden_state
        logits = model.lm_head(hidden)[0, ragged.rows]
        return (F.cross_entropy(logits, targets[ragged.rows], reduction="none") * weights).sum()

    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    found = recorded(model, loss, ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    found = recorded(model, torch.compile(loss, backend="aot_eager"), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
    torch._dynamo.reset()


def test_packed_equals_one_by_one_and_micro_batches_add_up():
    model = student("qwen2")
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model)
    weights, cu = uniform(ragged), ragged.cu_seqlens.tolist()
    rows = ragged.cu_rows.tolist()
    expected = truth(model, ids, targets, ragged, weights)
    model.zero_grad()
    fused(model, ids, targets, ragged).backward()
    ordinary = gradients(model)
    found = []
    for s in range(ragged.num_sequences):  # micro-batches of one rationale, gradients accumulating
        one_ids, one_targets, one = batch(LENGTHS[s : s + 1])
        one_ids = ids[:, cu[s] : cu[s + 1]]
        one_targets = targets[cu[s] : cu[s + 1]]
        with recorder.record(one) as norms:
            (row_losses(model, one_ids, one_targets, one) * weights[rows[s] : rows[s + 1]]).sum().backward()
        with pytest.raises(RuntimeError, match=r"lm_head\.weight has a gradient but no norm"):
            norms.squared.sum()
        model.zero_grad()
        with recorder.record(one) as norms:
            options = {"weights": torch.ones(1).double(), "normalizer": float(weights[rows[s] : rows[s + 1]].sum())}
            fused(model, one_ids, one_targets, one, **options).backward()
        found.append(norms.squared[0])
        for name, p in model.named_parameters():
            ordinary[name] -= p.grad
        model.zero_grad()
    torch.testing.assert_close(torch.stack(found), expected, rtol=1e-7, atol=0)
    for left in ordinary.values():
        torch.testing.assert_close(left, torch.zeros_like(left), rtol=0, atol=1e-12)


def test_an_upstream_factor_scales_norms_and_accumulation_keeps_batches_apart():
    model = student("gpt2")
    ids, targets, ragged = batch()
    recorder = SampleGradNorms(model)
    with recorder.record(ragged) as first:
        fused(model, ids, targets, ragged).backward()
    once = first.squared
    with recorder.record(ragged) as second:
        (3 * fused(model, ids, targets, ragged)).backward()  # gradients are not zeroed
    torch.testing.assert_close(second.squared, 9 * once, rtol=1e-9, atol=0)


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


def test_unweighted_norms_refuse_what_they_cannot_weigh_by_name():
    _, _, ragged = batch()
    with pytest.raises(ValueError, match=r"unweighted norms: lm_head\.weight trains"):
        SampleGradNorms(student("llama"), norms="unweighted")
    bias = student("qwen2").requires_grad_(False)
    bias.model.layers[0].self_attn.q_proj.bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"unweighted norms: model\.layers\.0\.self_attn\.q_proj\.bias trains"):
        SampleGradNorms(bias, norms="unweighted")
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


def test_autocast_norms_are_those_of_the_gradients_it_makes():
    model = student("llama", lora=True, dtype=torch.float32)
    ids, targets, ragged = batch()
    expected = truth(model.double(), ids, targets, ragged, uniform(ragged))
    nn.Module.to(model, torch.float32)
    for products in ("gram", "own"):
        with torch.autocast("cpu", torch.bfloat16):
            found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged, products=products)
        torch.testing.assert_close(found.double(), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("products", ["gram", "own"])
def test_bf16_norms_are_exact_on_its_own_activations_and_cancelling_rationales_are_told_apart(
    products, record_property
):
    """Against float64 on the same bf16 inputs and gradients: 1e-4, but where a rationale's tokens cancel each other.

    There a norm is a small difference of large sums: its error is bounded by what was summed, not by what is left.
    """
    model = student("llama", dtype=torch.bfloat16).requires_grad_(False)
    linear = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, nn.Linear)]
    for module in linear:
        module.requires_grad_(True)
    ids, targets, ragged = batch((40, 33, 70, 24))
    # Rationales 1 and 3 say one thing twice and mean nearly the opposite the second time.
    wanted = torch.randn(len(targets), model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    cu, seen = ragged.cu_seqlens.tolist(), {}
    recorder = SampleGradNorms(model, products=products)

    def watch(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        seen[module] = [inputs[0].detach()]
        output.register_hook(seen[module].append)

    for module in linear:  # what a layer saw, and the gradient that came back
        module.register_forward_hook(watch)
    hidden = torch.randn(1, len(targets), model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    for s, rest in ((1, 0.004), (3, 0.02)):
        a, half = cu[s], (cu[s + 1] - cu[s]) // 2
        hidden[:, a + half : a + 2 * half] = hidden[:, a : a + half]
        wanted[a + half : a + 2 * half] = -(1 - rest) * wanted[a : a + half]
        wanted[a + 2 * half : cu[s + 1]] = 0
    with recorder.record(ragged) as norms:
        x = hidden.to(torch.bfloat16).requires_grad_()
        mlp = model.model.layers[0].mlp
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))[0].backward(wanted.to(torch.bfloat16))
    truth, summed = torch.zeros(4).double(), torch.zeros(4).double()
    for seen_x, gradient in (seen[m] for m in linear if m in seen):
        for s, (a, b) in enumerate(zip(cu, cu[1:])):
            x, g = seen_x[0, a:b].double(), gradient[0, a:b].double()
            truth[s] += (g.T @ x).square().sum()
            summed[s] += ((g @ g.T) * (x @ x.T)).abs().sum()
    error = (norms.squared.double() - truth).abs()
    lost = summed / truth  # by how much a sum is larger than its result
    assert (lost[[0, 2]] < 100).all() and (lost[[1, 3]] > 1e3).all()
    assert (error / truth)[[0, 2]].max() < 1e-4
    assert (error / summed).max() < 1e-6
    for s in (1, 3):
        record_property(f"rationale_{s}", f"sums {lost[s]:.1e} times what is left, error {error[s] / truth[s]:.1e}")
        print(f"{products}, cancelling: sums {lost[s]:.1e} times what is left, error {error[s] / truth[s]:.1e}")


def test_groups_add_up_and_name_the_parts():
    model = student("gpt2")
    ids, targets, ragged = batch()
    with sample_grad_norms(model, ragged) as norms:
        fused(model, ids, targets, ragged).backward()
    groups = norms.by_group
    assert set(groups) == {"wte", "wpe", "ln_1", "attn", "ln_2", "mlp", "ln_f"}
    torch.testing.assert_close(sum(groups.values()), norms.squared)
    by_layer = lambda name: "first" if ".0." in name else "rest"  # noqa: E731
    with sample_grad_norms(model, ragged, groups=by_layer) as norms:
        fused(model, ids, targets, ragged).backward()
    assert set(norms.by_group) == {"first", "rest"}


def test_hutchinson_is_unbiased_and_knows_its_error():
    model = student("llama", lora=False)
    ids, targets, ragged = batch()
    exact = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.manual_seed(0)
    estimates, errors = [], []
    recorder = SampleGradNorms(model, method="hutchinson", probes=8)
    for _ in range(40):
        with recorder.record(ragged) as norms:
            fused(model, ids, targets, ragged).backward()
        estimates.append(norms.squared)
        errors.append(norms.standard_error)
    mean, spread = torch.stack(estimates).mean(0), torch.stack(estimates).std(0)
    assert ((mean - exact).abs() < 4 * spread / 40**0.5).all()
    assert (spread > 0).all()
    torch.testing.assert_close(torch.stack(errors).square().mean(0).sqrt(), spread, rtol=0.5, atol=0)


class _Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x)) * self.gain


def test_what_is_not_covered_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"gain trains, but its norm is not covered.*no rule for a _Odd"):
        SampleGradNorms(_Odd())
    model = _Odd()
    recorder = SampleGradNorms(model, uncovered="skip")
    assert recorder.skipped == ["gain"]
    ragged = Ragged.build(sequence_lengths=[2, 3], prompt_lengths=[1, 1], rationales_per_question=[2])
    with recorder.record(ragged), pytest.raises(RuntimeError, match="layer.weight is used twice"):
        model(torch.randn(5, 4))
    with recorder.record(ragged), pytest.raises(RuntimeError, match="called on 6 rows, the batch has 5"):
        model(torch.randn(6, 4))
    with pytest.raises(ValueError, match="no rule for a MixtralTopKRouter"):
        SampleGradNorms(tiny("mixtral"))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match=r"0\.weight trains.*shared with 1\.weight"):
        SampleGradNorms(shared)


def test_frozen_parameters_do_not_count():
    model = student("qwen2")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("q_proj.bias" in name or "k_proj.weight" in name or "up_proj" in name)
    ids, targets, ragged = batch()
    expected = truth(model, ids, targets, ragged, uniform(ragged))
    found = recorded(model, lambda: fused(model, ids, targets, ragged), ragged)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def test_ddp_and_fsdp2_ranks_have_the_norms_of_their_own_rationales():
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "tests.distributed_norms"], cwd=Path(__file__).parent.parent, timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed:") == 6
