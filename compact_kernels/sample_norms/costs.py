"""Which way to a linear layer's norms is the least work: by estimates, before a batch runs.

A weight's gradient costs a product over all tokens with norms or without. What norms add to it is told here in tokens:
as much time as cuBLAS takes for the same product over so many of them.
"""

from __future__ import annotations

from compact_kernels.sample_norms.segments import Segments

NARROW = 64  # of LoRA's inner width, at most: its products are read-bound and made together with the norms
# What norms cost, as a share of a cuBLAS product of as many operations, measured on an H100 (bfloat16, 256 to 2048
# tokens): a weight's gradient made together with its norms, less that of the gradient alone; and a full Gram matrix.
OWN_PRODUCT = 1.5
GRAM = 1.33
# Estimated: to write a rationale's product and read it again, 8 bytes an entry at 2.8 TB/s, takes as long as its
# multiplications, 2 operations an entry and token at 600 TFLOP/s, over so many tokens.
STORED = 860
STORED_BYTES = 512 * 2**20  # of a layer's stored products, at most: they are there beside all activations
TILE, MULTIPROCESSORS = 128, 132  # a product of fewer tiles leaves multiprocessors idle


def _stored(m: int, n: int, segments: Segments) -> float:
    """Tokens that stored products of an (m, n) weight cost; rationales of one length fill a device together."""
    if 4 * segments.count * m * n > STORED_BYTES:
        return float("inf")
    fill = MULTIPROCESSORS / (-(-m // TILE) * -(-n // TILE))
    made = sum(max(count, fill) * length for _, count, length in segments.runs)
    return made - segments.tokens + STORED * segments.count


def stored(m: int, n: int, segments: Segments) -> bool:
    """Whether an (m, n) weight's own products are stored by rationale, or made and added up by one kernel."""
    return min(m, n) > NARROW and _stored(m, n, segments) < OWN_PRODUCT * segments.tokens


def own(width: int, outputs: list[int], segments: Segments) -> bool:
    """Whether layers that share an input make their weights' gradients themselves, or have Gram matrices."""
    if min(width, *outputs) <= NARROW:
        return True
    product = sum(min(OWN_PRODUCT * segments.tokens, _stored(width, n, segments)) * n for n in outputs) * width
    return product < GRAM * segments.squares * (width + sum(outputs))
