"""Per-rationale norms of the head's own gradient, collected where the head has its gradient rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compact_kernels.rule import segment_sum
from compact_kernels.sample_norms import ops
from compact_kernels.sample_norms.segments import Segments


@dataclass
class HeadNorms:
    """‖H_s‖² of one pass, Gᵀ X by Gram matrices, a chunk of rows or a block of the vocabulary at a time.

    Both ways add up: rationales are whole in a chunk of rows, and GGᵀ is a sum over columns.
    """

    rows: Segments  # of the scored rows
    ids: Tensor | None  # (T,) the batch's tokens, where the weight is tied to their embedding
    tokens: Segments  # of all tokens
    biased: bool
    parts: Tensor | None = None  # (M,)
    tied_rows: Tensor | None = None  # (T, D) rows of the head's gradient that the rationale's tokens ask for

    def start(self) -> None:
        self.parts = self.tied_rows = None

    def add(
        self,
        gradient: Tensor,
        x: Tensor,
        factor: Tensor | None,
        rationales: tuple[int, int] | None = None,
        first_row: int = 0,
        first_column: int = 0,
    ) -> None:
        """Rows of the logits' gradient (c, width) from `first_row` and `first_column` on, each times its `factor`.

        Args:
            rationales: the first of the rows and the one after the last; None: all.
        """
        first, last = rationales or (0, self.rows.count)
        tiles = slice(self.rows.first_tiles[first], self.rows.first_tiles[last])
        cu = self.rows.cu - first_row if first_row else self.rows.cu
        found = ops.gram_norms(x, [gradient], int(self.biased), cu, self.rows.tiles[tiles], factor)
        if self.parts is None:
            self.parts = found.new_zeros(self.rows.tiles.shape[0])
        self.parts[tiles] += found
        if self.ids is None:
            return
        cu, tokens = cu[first : last + 1], self.tokens.cu[first : last + 1]
        added = ops.token_rows(gradient, factor, x, cu, self.ids, tokens, first_column, self.tokens.longest)
        self.tied_rows = added if self.tied_rows is None else self.tied_rows.add_(added)

    def gradients(self, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of the slot (1, S) and of the carrier (T, D), for a loss whose own gradient is `upstream`."""
        if self.parts is None:
            return None, None
        norms = segment_sum(self.parts, self.rows.cu_tiles)[None] * upstream.to(self.parts.dtype).square()
        rows = None if self.tied_rows is None else self.tied_rows * upstream.to(self.tied_rows.dtype)
        return norms, rows
