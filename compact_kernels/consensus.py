"""Eq. 4–5 in one launch: the weighted in-degree of every rationale in the graph of its question."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from compact_kernels.ragged import Ragged

TILE = 4096  # heads × rationales × width of the keys that a program holds at once


def in_degree(query: Tensor, key: Tensor, ragged: Ragged, temperature: float = 1.0) -> Tensor:
    """S_cons,k = Σ_{i≠k} A_ik, A = mean over heads of softmax_j(q_i · k_j / (√d · temperature)).

    One program a question, in float32 whatever the inputs are; deterministic; nothing is read back or copied.

    Args:
        query, key: float32, bfloat16 or float16; strided in all but the last dimension. (S, H, d) or (S, d)

    Returns:
        (S,) float32; 0 for a rationale alone.
    """
    if query.dim() == 2:
        query, key = query[:, None], key[:, None]
    query, key = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key))
    degree = torch.empty(query.shape[0], dtype=torch.float32, device=query.device)
    if ragged.num_questions == 0:
        return degree
    heads, width = query.shape[1:]
    slots = triton.next_power_of_2(ragged.sizes.most_rationales)
    block_d = min(triton.next_power_of_2(width), max(TILE // slots, 16))
    block_h = min(triton.next_power_of_2(heads), max(TILE // (slots * block_d), 1))
    _in_degree_kernel[(ragged.num_questions,)](
        query,
        key,
        ragged.cu_questions,
        degree,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        1.0 / (math.sqrt(width) * temperature),
        H=heads,
        D=width,
        K=slots,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return degree


@triton.jit
def _in_degree_kernel(
    query_ptr,
    key_ptr,
    cu_questions_ptr,
    degree_ptr,
    query_stride,
    query_head_stride,
    key_stride,
    key_head_stride,
    scale,
    H: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One question. For each block of heads and each i: scores of q_i with all keys (BLOCK_H, K), softmax over the
    keys, added up without the entry of i itself; a head beyond H adds nothing.
    """
    question = tl.program_id(0)
    first = tl.load(cu_questions_ptr + question).to(tl.int64)
    count = (tl.load(cu_questions_ptr + question + 1) - first).to(tl.int32)
    slot = tl.arange(0, K)
    m_k = slot < count
    degree = tl.zeros((BLOCK_H, K), dtype=tl.float32)
    for o_head in range(0, H, BLOCK_H):
        head = o_head + tl.arange(0, BLOCK_H)
        m_head = head < H
        for i in range(0, count):
            score = tl.zeros((BLOCK_H, K), dtype=tl.float32)
            for o_width in range(0, D, BLOCK_D):
                width = o_width + tl.arange(0, BLOCK_D)
                m_width = width < D
                q = tl.load(
                    query_ptr + (first + i) * query_stride + head[:, None] * query_head_stride + width[None, :],
                    mask=m_head[:, None] & m_width[None, :],
                    other=0.0,
                ).to(tl.float32)
                row = (first + slot)[None, :, None] * key_stride + head[:, None, None] * key_head_stride
                k = tl.load(
                    key_ptr + row + width[None, None, :],
                    mask=m_head[:, None, None] & m_k[None, :, None] & m_width[None, None, :],
                    other=0.0,
                ).to(tl.float32)
                score += tl.sum(q[:, None, :] * k, 2)
            score = tl.where(m_k[None, :], score * scale, -float("inf"))
            weight = tl.exp(score - tl.max(score, 1)[:, None])
            affinity = weight / tl.sum(weight, 1)[:, None]
            degree += tl.where(m_head[:, None] & (slot != i)[None, :], affinity, 0.0)
    tl.store(degree_ptr + first + slot, tl.sum(degree, 0) / H, mask=m_k)
