"""compatibility_loss on nasty inputs and in little memory, in float64 unless a test says otherwise."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compact_kernels import CompatibilityRule, Ragged, compatibility_loss, linear_logprob, linear_token_stats
from tests import brute_force as loops
from tests.brute_force import Batch, Head
from tests.reference_cases import close, gradients, make, run

NAN = math.nan


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
