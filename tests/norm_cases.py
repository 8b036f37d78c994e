"""What the tests of gradient norms share: students, batches, losses, and the truth, one backward pass a rationale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compact.config import LoraConfig
from compact.student import add_lora, prepare
from compact_kernels import Ragged, compatibility_loss, sample_grad_norms
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


def recorded(model: nn.Module, step, ragged: Ragged, **options) -> Tensor:
    with sample_grad_norms(model, ragged, **options) as norms:
        step().backward()
    return norms.squared
