"""Kernels for eq. 9 and MIND's JSD on rows of unnormalised probabilities: values, and gradients in place.

A buffer E (c, ≥ V) holds, for the answer rows of some questions, E_rv = exp(z_rv − shift_r), and S_r = Σ_v E_rv, so
p = E/S and log p = log E − log S. An E that underflowed is 0 in p and the smallest normal number in log p: finite,
and multiplied with a probability of 0 wherever a token is forbidden to every rationale.

Of a question, the rationales whose spans have one length m > 0 form a class, and D_q sums over classes the mean over
the m positions of Σ_{k≠i} α_k α_i KL(P_k‖P_i), or Σ_{k<i} α_k α_i JSD(P_k, P_i). Both are Σ_k α_k C_k with, for
A = Σ α, L = Σ α log p and P = Σ α p over the class at one position,

    kl:   t_kv = A log p_kv − L_v                    C_k = Σ_v p_kv t_kv    ∂/∂z_k = α_k [p_k (t_k − C_k) + A p_k − P]
    jsd:  t_kv = ½ Σ_i α_i log(2 p_kv / (p_kv + p_iv))    (same)                 ∂/∂z_k = α_k  p_k (t_k − C_k)

so the gradient over α_k is finite at α_k = 0. Both A log p_k − L and A p_k − P are taken relative to the rationale of
the largest α, which changes neither: α may be 1 and 0.001, and that rationale's own term is all rounding otherwise.
A program holds one tile of vocabulary for all rationales of a class, so every element is read once.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _locate(
    cu_questions_ptr,
    cu_span_ptr,
    span_rows_ptr,
    first_question,
    first_row,
    longest,
    GATHERED: tl.constexpr,
    K: tl.constexpr,
):
    """The class that a program works on: `lead`, its first rationale, is the program's; others have nothing to do.

    Returns whether it is, the question's first rationale, the mask of the class (K,), its span length, the entry of
    the span of each rationale at the program's position (K,) and its row in the buffer (K,), int64.
    """
    unit = tl.program_id(0)
    lead = unit % K
    position = (unit // K) % longest
    question = first_question + unit // (K * longest)
    first = tl.load(cu_questions_ptr + question)
    count = tl.load(cu_questions_ptr + question + 1) - first
    slot = tl.arange(0, K)
    m_k = slot < count
    start = tl.load(cu_span_ptr + first + slot, mask=m_k, other=0)
    length = tl.load(cu_span_ptr + first + slot + 1, mask=m_k, other=0) - start
    own = tl.sum(tl.where(slot == lead, length, 0), 0)  # 0 for a slot without a rationale
    m_k = m_k & (length == own) & (length > position)
    leads = tl.min(tl.where(m_k, slot, K), 0) == lead
    entry = (start + position).to(tl.int64)
    if GATHERED:
        row = entry - first_row
    else:
        row = tl.load(span_rows_ptr + entry, mask=m_k, other=0) - first_row
    return leads, first, m_k, own, entry, row


@triton.jit
def _read(buffer_ptr, row, stride, pivot, mass, column, m_k, V, HAS_PIVOT: tl.constexpr):
    """What is stored, and E: a tile (K, BLOCK) of each, in float32; 0 outside the class and the vocabulary."""
    mask = m_k[:, None] & (column < V)[None, :]
    stored = tl.load(buffer_ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    e = stored
    if HAS_PIVOT:
        e = tl.where(column[None, :] == tl.maximum(pivot, 0)[:, None], mass[:, None], e)
    return stored, e, mask


@triton.jit
def _log2(x, FAST: tl.constexpr):
    """log₂ of a positive, normal x; FAST is NVIDIA's one instruction, off by 2⁻²² near 1 and by two ulp elsewhere."""
    if FAST:
        return libdevice.fast_log2f(x)
    else:
        return tl.log2(x)


@triton.jit
def _pair(t, p, other, alpha, FAST: tl.constexpr, K: tl.constexpr):
    """t with what rationale `other` adds to it under the JSD; p (K, BLOCK) is positive."""
    slot = tl.arange(0, K)
    p_other = tl.sum(tl.where((slot == other)[:, None], p, 0.0), 0)[None, :]
    alpha_other = tl.sum(tl.where(slot == other, alpha, 0.0), 0)
    factor = tl.where(slot == other, 0.0, alpha_other * (0.5 * LN2))  # a rationale is no pair with itself
    if FAST:
        ratio = libdevice.fast_dividef(p, p + p_other)
    else:
        ratio = p / (p + p_other)
    # TINY over a sum that rounds above 1 is subnormal, which the fast quotient makes 0.
    return t + factor[:, None] * _log2(tl.maximum(2.0 * ratio, TINY), FAST)


@triton.jit
def _above_mean(values, alpha, total, K: tl.constexpr):
    """A·values − Σ α values over the class, (K, BLOCK), exact where a rationale has nearly all of α."""
    heaviest = tl.arange(0, K) == tl.argmax(alpha, 0)
    values -= tl.sum(tl.where(heaviest[:, None], values, 0.0), 0)[None, :]
    return total * values - tl.sum(alpha[:, None] * values, 0)[None, :]


@triton.jit
def _score(e, inverse, alpha, total, JSD: tl.constexpr, FAST: tl.constexpr, K: tl.constexpr):
    """p and t of the docstring above, (K, BLOCK); `inverse` is 1/S."""
    p = e * inverse[:, None]
    if JSD:
        t = tl.zeros_like(p)
        positive = tl.maximum(p, TINY)
        if K <= 8:
            for other in tl.static_range(K):
                t = _pair(t, positive, other, alpha, FAST, K)
        else:
            for other in range(K):
                t = _pair(t, positive, other, alpha, FAST, K)
    else:
        logp = _log2(tl.maximum(e, TINY), FAST) + tl.log2(inverse)[:, None]
        t = _above_mean(logp, alpha * LN2, total * LN2, K)
    return p, t


@triton.jit(do_not_specialize=["first_question", "first_row", "longest", "tiles", "first_span", "num_spans"])
def value_kernel(
    buffer_ptr,
    sums_ptr,
    pivots_ptr,
    masses_ptr,
    cu_questions_ptr,
    cu_span_ptr,
    span_rows_ptr,
    alpha_ptr,
    stride,
    V,
    tiles,
    first_question,
    first_row,
    longest,
    partial_ptr,
    first_span,
    num_spans,
    JSD: tl.constexpr,
    GATHERED: tl.constexpr,
    FAST: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """C_k of a class at one position, summed over `tiles` tiles of the vocabulary: partial (splits, spans)."""
    leads, first, m_k, length, entry, row = _locate(
        cu_questions_ptr, cu_span_ptr, span_rows_ptr, first_question, first_row, longest, GATHERED, K
    )
    if not leads:
        return
    slot = tl.arange(0, K)
    alpha = tl.load(alpha_ptr + first + slot, mask=m_k, other=0.0)
    inverse = 1.0 / tl.load(sums_ptr + row, mask=m_k, other=1.0)
    total = tl.sum(alpha, 0)
    pivot, mass = slot, tl.full((K,), 1.0, dtype=tl.float32)
    if pivots_ptr is not None:
        pivot = tl.load(pivots_ptr + row, mask=m_k, other=0).to(tl.int32)
        if masses_ptr is not None:
            mass = tl.load(masses_ptr + row, mask=m_k, other=0.0)
    score = tl.zeros((K, BLOCK), dtype=tl.float32)
    if tl.sum(m_k.to(tl.int32), 0) > 1:  # alone, C is exactly 0
        start = tl.program_id(1) * tiles * BLOCK
        for o_column in range(start, tl.minimum(start + tiles * BLOCK, V), BLOCK):
            column = o_column + tl.arange(0, BLOCK)
            stored, e, mask = _read(buffer_ptr, row, stride, pivot, mass, column, m_k, V, pivots_ptr is not None)
            p, t = _score(e, inverse, alpha, total, JSD, FAST, K)
            score += p * t
    out = partial_ptr + tl.program_id(1).to(tl.int64) * num_spans + entry - first_span
    tl.store(out, tl.sum(score, 1), mask=m_k)


@triton.jit(do_not_specialize=["first_question", "first_span", "num_spans"])
def reduce_kernel(
    partial_ptr,
    alpha_ptr,
    cu_questions_ptr,
    cu_span_ptr,
    per_question_ptr,
    scores_ptr,
    first_question,
    first_span,
    num_spans,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """C of every span row of a question, and D = Σ_k (α_k / m_k) Σ_j C_kj."""
    question = first_question + tl.program_id(0)
    first = tl.load(cu_questions_ptr + question)
    count = tl.load(cu_questions_ptr + question + 1) - first
    slot = tl.arange(0, K)
    m_k = slot < count
    start = tl.load(cu_span_ptr + first + slot, mask=m_k, other=0)
    length = tl.load(cu_span_ptr + first + slot + 1, mask=m_k, other=0) - start
    alpha = tl.load(alpha_ptr + first + slot, mask=m_k, other=0.0)
    split = tl.arange(0, SPLITS).to(tl.int64) * num_spans
    total = tl.zeros((K, BLOCK), dtype=tl.float32)
    for o_position in range(0, tl.max(length, 0), BLOCK):
        position = o_position + tl.arange(0, BLOCK)
        entry = start[:, None] + position[None, :]
        mask = position[None, :] < length[:, None]
        source = partial_ptr + split[None, None, :] + (entry - first_span)[:, :, None]
        score = tl.sum(tl.load(source, mask=mask[:, :, None], other=0.0), 2)
        tl.store(scores_ptr + entry, score, mask=mask)
        total += score
    weight = alpha / tl.maximum(length, 1).to(tl.float32)
    tl.store(per_question_ptr + question, tl.sum(weight * tl.sum(total, 1), 0))


@triton.jit(do_not_specialize=["first_question", "first_row", "longest", "tiles"])
def gradient_kernel(
    buffer_ptr,
    sums_ptr,
    pivots_ptr,
    masses_ptr,
    cu_questions_ptr,
    cu_span_ptr,
    span_rows_ptr,
    alpha_ptr,
    stride,
    V,
    tiles,
    first_question,
    first_row,
    longest,
    scores_ptr,
    gain_ptr,
    shift_ptr,
    inverse_ptr,
    over_ptr,
    under_ptr,
    constant,
    inverse_cap,
    ignore_index,
    JSD: tl.constexpr,
    GATHERED: tl.constexpr,
    FAST: tl.constexpr,
    REPLACE: tl.constexpr,
    TIMES_SUM: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The rows of a class at one position, `tiles` tiles of the vocabulary, in place.

    A tile is read whole before it is written, and no other program reads or writes it.
    """
    leads, first, m_k, length, entry, row = _locate(
        cu_questions_ptr, cu_span_ptr, span_rows_ptr, first_question, first_row, longest, GATHERED, K
    )
    if not leads:
        return
    partners = tl.sum(m_k.to(tl.int32), 0) > 1
    if not REPLACE:
        if not partners:
            return
    slot = tl.arange(0, K)
    alpha = tl.load(alpha_ptr + first + slot, mask=m_k, other=0.0)
    sums = tl.load(sums_ptr + row, mask=m_k, other=1.0)
    inverse = 1.0 / sums
    score = tl.load(scores_ptr + entry, mask=m_k, other=0.0)
    gain = tl.where(m_k, 1.0, 0.0)
    if gain_ptr is not None:
        gain = tl.load(gain_ptr + first + slot, mask=m_k, other=0.0)
    if over_ptr is not None:
        gain = tl.maximum(gain, 1.0) * (constant * tl.load(over_ptr) / tl.load(under_ptr))
    gain = gain / length.to(tl.float32)
    gain = tl.where(partners, gain, 0.0)
    if TIMES_SUM:
        gain = gain * sums
    total = tl.sum(alpha, 0)
    pivot, mass = slot, tl.full((K,), 1.0, dtype=tl.float32)
    if pivots_ptr is not None:
        pivot = tl.load(pivots_ptr + row, mask=m_k, other=0).to(tl.int32)
        if masses_ptr is not None:
            mass = tl.load(masses_ptr + row, mask=m_k, other=0.0)
    m_own = m_k  # rows with a gradient of their own
    if inverse_ptr is not None:
        m_own = pivot != ignore_index
        if tl.program_id(1) == 0:
            tl.store(inverse_ptr + row, 1.0 / sums, mask=m_k & (pivot == ignore_index))
    start = tl.program_id(1) * tiles * BLOCK
    for o_column in range(start, tl.minimum(start + tiles * BLOCK, V), BLOCK):
        column = o_column + tl.arange(0, BLOCK)
        stored, e, mask = _read(buffer_ptr, row, stride, pivot, mass, column, m_k, V, pivots_ptr is not None)
        p, t = _score(e, inverse, alpha, total, JSD, FAST, K)
        if JSD:
            dz = p * (t - score[:, None])
        else:
            dz = p * (t - score[:, None]) + _above_mean(p, alpha, total, K)
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + row, mask=m_k, other=0.0)
            tanh = (tl.log(tl.maximum(e, TINY)) + shift[:, None]) * inverse_cap
            dz *= 1.0 - tanh * tanh
        dz *= gain[:, None]
        if not REPLACE:
            dz += tl.where(m_own[:, None], stored, 0.0)
        target = buffer_ptr + row[:, None] * stride + column[None, :]
        tl.store(target, dz.to(buffer_ptr.dtype.element_ty), mask=mask)
