"""Every op in plain torch: the definition that fast paths are compared with, float64-capable.

Memory is bounded: logits exist for `workspace_mib` worth of rows at a time, in the forward pass and, recomputed, in
the backward pass. The shapes: T packed tokens, N scored rows, S rationales, Q questions, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from compact_kernels import arguments
from compact_kernels.head.linear import LinearHead
from compact_kernels.ragged import Ragged
from compact_kernels.rule import TokenStatistics, question_slots
from compact_kernels.weighting import Kind


def token_pass(
    head: LinearHead, hidden: Tensor, targets: Tensor, ragged: Ragged, ignore_index: int, workspace_mib: int
) -> tuple[Tensor, TokenStatistics]:
    """Differentiable log-probs (N,) and detached statistics of the scored rows.

    Args:
        hidden: (T, D). targets: of the scored rows, `ignore_index` where none. (N,)
    """
    counts = ragged.host.cu_evidence.diff()
    widest = max(int(counts.max()) if counts.numel() else 0, 1)
    slot = torch.arange(widest, device=hidden.device)
    starts = ragged.cu_evidence[:-1].long()
    asked = slot < ragged.cu_evidence.diff()[:, None]  # (S, m)
    last = max(ragged.evidence_ids.numel() - 1, 0)
    ids = ragged.evidence_ids.new_zeros(1) if ragged.evidence_ids.numel() == 0 else ragged.evidence_ids
    answer_ids = ids[(starts[:, None] + slot).clamp_max(last)]  # (S, m)
    sequence = ragged.sequence_of_row

    def chunk(rows: Tensor, target: Tensor, owner: Tensor) -> tuple[Tensor, ...]:
        logp = head(rows).log_softmax(-1)  # (c, V); z − logsumexp would round at the size of the logits
        counted = target != ignore_index
        target = target.where(counted, 0)[:, None]
        logprob = logp.gather(1, target).squeeze(1).where(counted, 0.0)
        with torch.no_grad():
            wanted = asked[owner]
            evidence = logp.gather(1, answer_ids[owner]).where(wanted, 0.0).sum(-1) / wanted.sum(-1).clamp_min(1)
            p = logp.exp()
            entropy = torch.special.entr(p).sum(-1)
            # p_target − 1 = −Σ of the others: no cancellation for confident tokens.
            others = p.scatter(1, target, 0.0)
            grad_norm = (others.sum(-1).square() + others.square().sum(-1)).sqrt().where(counted, 0.0)
        return logprob, entropy, evidence, grad_norm

    rows = hidden[ragged.rows]
    logprob, entropy, evidence, grad_norm = _over_rows(chunk, rows, head.vocabulary, workspace_mib, targets, sequence)
    return logprob, TokenStatistics(logprob.detach(), entropy, evidence, grad_norm)


def logprob(
    head: LinearHead, hidden: Tensor, targets: Tensor, ignore_index: int, workspace_mib: int
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the rows hidden (n, D), both differentiable; 0 where the target is ignored."""

    def chunk(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logp = head(rows).log_softmax(-1)
        counted = ids != ignore_index
        chosen = logp.gather(1, ids.where(counted, 0)[:, None]).squeeze(1)
        p = logp.exp()
        entropy = -(p * logp.where(p > 0, 0.0)).sum(-1)
        return chosen.where(counted, 0.0), entropy.where(counted, 0.0)

    logprobs, entropies = _over_rows(chunk, hidden, head.vocabulary, workspace_mib, targets)
    return logprobs, entropies


def answer_divergence(
    hidden: Tensor,
    head_weight: Tensor,
    ragged: Ragged,
    alpha: Tensor,
    *,
    kind: Kind = "kl",
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace_mib: int = 256,
) -> Tensor:
    """Eq. 9 and MIND's JSD (Q,), as :func:`compact_kernels.answer_divergence` describes them."""
    if kind not in ("kl", "jsd"):
        raise ValueError(f"kind is {kind!r}; it is kl or jsd")
    arguments.check_packed(hidden, ragged)
    arguments.check_head(hidden, head_weight, bias)
    arguments.check_per_rationale("alpha", alpha, ragged)
    head = LinearHead(head_weight, bias, logit_scale, softcap, temperature)
    alpha = alpha.detach()
    packed = ragged.rows[ragged.span_rows]
    cu_questions, cu_span = ragged.host.cu_questions.tolist(), ragged.host.cu_span.tolist()
    totals = []
    for first, last in zip(cu_questions[:-1], cu_questions[1:]):
        groups: dict[int, list[int]] = {}  # span length: the question's rationales that have it
        for s in range(first, last):
            groups.setdefault(cu_span[s + 1] - cu_span[s], []).append(s)
        total = hidden[:0].sum().to(alpha.dtype)
        for length, members in groups.items():
            if length == 0 or len(members) < 2:
                continue
            positions = torch.stack([packed[cu_span[s] : cu_span[s + 1]] for s in members])  # (k, m)
            weight = torch.stack([alpha[s] for s in members])  # (k,)
            states = hidden[positions]  # (k, m, D)
            size = max(1, (workspace_mib << 20) // (4 * head_weight.shape[0] * len(members)))  # rows at once
            for rows in states.split(size, dim=1):
                part = checkpoint(_pairwise_divergence, head, rows, weight, kind, use_reentrant=False)
                total = total + part * (rows.shape[1] / length)
        totals.append(total)
    return torch.stack(totals) if totals else alpha.new_zeros(0)


def question_consensus(
    query: Tensor,
    key: Tensor,
    ragged: Ragged,
    *,
    temperature: float = 1.0,
    centrality: Literal["in_degree", "pagerank", "eigenvector"] = "in_degree",
) -> Tensor:
    """S_cons of every rationale (S,), as :func:`compact_kernels.question_consensus` describes it."""
    if centrality not in ("in_degree", "pagerank", "eigenvector"):
        raise ValueError(f"centrality is {centrality!r}; it is one of in_degree, pagerank, eigenvector")
    affinity, present = question_affinity(query, key, ragged, temperature=temperature)
    edges = affinity - torch.diag_embed(affinity.diagonal(dim1=1, dim2=2))  # (Q, K, K), i → j
    if centrality == "in_degree" or ragged.num_sequences == 0:
        score = edges.sum(1)
    elif centrality == "pagerank":
        score = _pagerank(edges, present)
    else:
        score = _eigenvector(edges, present)
    alone = present.sum(1, keepdim=True) == 1
    return score.where(~alone, 0.0)[present]


def question_affinity(
    query: Tensor, key: Tensor, ragged: Ragged, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """A_ij of eq. 4 for every question, padded to the largest K.

    Returns:
        A (Q, K, K), rows summing to one, softmax per head and then the mean over heads; and the mask of the
        rationales that exist (Q, K).
    """
    arguments.check_query_key(query, key, ragged, temperature)
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    if query.dim() == 2:
        query, key = query[:, None], key[:, None]
    index, present = question_slots(ragged)
    with torch.autocast(query.device.type, enabled=False):  # states after like suffixes are close
        scores = torch.einsum("qihd,qjhd->qhij", query[index], key[index]) / (math.sqrt(query.shape[-1]) * temperature)
    scores = scores.masked_fill(~present[:, None, None, :], -math.inf)
    affinity = scores.softmax(-1).mean(1)
    return affinity.where(present[:, :, None] & present[:, None, :], 0.0), present


def _over_rows(
    function: Callable[..., tuple[Tensor, ...]], hidden: Tensor, vocabulary: int, workspace_mib: int, *rest: Tensor
) -> tuple[Tensor, ...]:
    """Apply `function` to chunks of rows, recomputing each chunk in the backward pass, and join the results."""
    size = max(1, (workspace_mib << 20) // (4 * vocabulary))
    parts = []
    for start in range(0, max(hidden.shape[0], 1), size):  # one empty chunk keeps the graph connected without rows
        chunk = [tensor[start : start + size] for tensor in (hidden, *rest)]
        if torch.is_grad_enabled():
            parts.append(checkpoint(function, *chunk, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(function(*chunk))
    return tuple(torch.cat(pieces) for pieces in zip(*parts))


def _pairwise_divergence(head: LinearHead, hidden: Tensor, weight: Tensor, kind: str) -> Tensor:
    """Σ over pairs of k rationales whose m answer rows align: hidden (k, m, D), weight (k,)."""
    logp = head(hidden).log_softmax(-1)  # (k, m, V)
    logp = logp.clamp_min(torch.finfo(logp.dtype).min / 4)  # a forbidden token has p = 0 in each, and −∞ − (−∞) is NaN
    p = logp.exp()
    total = logp.new_zeros(())
    for i in range(hidden.shape[0]):
        if kind == "kl":
            pair = (p[i] * (logp[i] - logp)).sum(-1).mean(-1)  # (k,) KL(i ‖ j); 0 for j = i
        else:
            mean = torch.logaddexp(logp[i], logp) - math.log(2.0)
            pair = 0.5 * (p[i] * (logp[i] - mean) + p * (logp - mean)).sum(-1).mean(-1)
            pair = pair[i + 1 :]
        total = total + weight[i] * (weight[-pair.numel() :] * pair).sum() if pair.numel() else total
    return total


def _pagerank(edges: Tensor, present: Tensor, damping: float = 0.85, steps: int = 100) -> Tensor:
    count = present.sum(1, keepdim=True)
    uniform = present.to(edges.dtype) / count
    out = edges.sum(2, keepdim=True)
    walk = torch.where(out == 0, uniform[:, None, :], edges / out.where(out != 0, 1.0))  # what is NaN stays so
    rank = uniform
    for _ in range(steps):
        rank = damping * torch.einsum("qi,qij->qj", rank, walk) + (1 - damping) * uniform
    return rank


def _eigenvector(edges: Tensor, present: Tensor, doublings: int = 24) -> Tensor:
    # Power iteration of Aᵀ + I, which has the same eigenvectors and converges. By squaring, and with A scaled to 1:
    # rows that saturate on the diagonal leave edges so small that a few hundred steps would not move the vector.
    scale = edges.amax((1, 2), keepdim=True).clamp_min(torch.finfo(edges.dtype).tiny)
    power = edges.mT / scale + torch.eye(edges.shape[1], dtype=edges.dtype, device=edges.device)
    for _ in range(doublings):
        power = power @ power
        power = power / power.amax((1, 2), keepdim=True)
    vector = torch.einsum("qij,qj->qi", power, present.to(edges.dtype))
    return vector / vector.norm(dim=1, keepdim=True)
