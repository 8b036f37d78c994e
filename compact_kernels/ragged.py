"""The shape of a packed batch: which tokens belong to which rationale, which rationale to which question.

Everything a kernel needs to know about sizes is here, on the host and on the device, so that nothing downstream
asks the device for a size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from operator import index
from typing import NamedTuple, SupportsIndex

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """What launches need to know of a batch's shape."""

    cu_seqlens: list[int]
    cu_questions: list[int]
    cu_rows: list[int]
    cu_span: list[int]
    most_rationales: int  # the largest K
    longest_answer: int  # the largest m
    evidence_range: tuple[int, int] | None  # least and greatest of the answers' ids


def _once(found: Callable[[Ragged], Tensor]) -> cached_property[Tensor]:
    """A property found once a batch, outside of inference mode: what that makes can be in no later graph."""
    return cached_property(torch.inference_mode(False)(found))


@dataclass(frozen=True, eq=False)
class Ragged:
    """One batch of Q questions with S rationales in T packed tokens, of which N rows are scored.

    A *row* is a token position whose hidden state predicts the next token; the scored rows of a rationale are
    r_0 … r_{T_k−1} (method §1): the last prompt token up to the token before EOS. Rows run in packed order.

    Build it with :meth:`build` (from lengths) or :meth:`from_labels` (from a label mask); both check their input.
    """

    cu_seqlens: Tensor  # (S+1,) int32  packed token offsets of the rationales
    cu_questions: Tensor  # (Q+1,) int32  rationale offsets of the questions
    rows: Tensor  # (N,) int64  packed positions of the scored rows, increasing
    cu_rows: Tensor  # (S+1,) int32  offsets into `rows` of the rationales
    body_lengths: Tensor  # (S,) int32  B_k, body tokens: rows r_0 … r_{B_k} carry eq. 3
    thinking: Tensor  # (N,) bool  the token just read at the row is a thinking token (M of eq. 3)
    evidence_ids: Tensor  # (A,) int64  ids a_1 … a_m of the gold answer, end to end
    cu_evidence: Tensor  # (S+1,) int32  offsets into `evidence_ids` of the rationales
    span_rows: Tensor  # (G,) int64  indices into `rows` of the rows that predict the answer span, end to end
    cu_span: Tensor  # (S+1,) int32  offsets into `span_rows` of the rationales
    max_seqlen: int = 0  # at least the longest of `cu_seqlens`; a plain number, which torch.compile reads
    _host: Ragged | None = field(default=None, repr=False)

    @classmethod
    def build(
        cls,
        *,
        sequence_lengths: Sequence[int],
        prompt_lengths: Sequence[int],
        rationales_per_question: Sequence[int],
        body_lengths: Sequence[int] | None = None,
        evidence_ids: Sequence[Sequence[int]] | None = None,
        answer_spans: Sequence[tuple[int, int]] | None = None,
        thinking: Sequence[Sequence[bool]] | None = None,
    ) -> Ragged:
        """Describe a batch by its lengths.

        Args:
            sequence_lengths: tokens of each rationale, prompt included. (S,)
            prompt_lengths: tokens of each rationale's prompt; at least 1. (S,)
            rationales_per_question: K of each question; sums to S. (Q,)
            body_lengths: B_k of each rationale; default: the whole completion. (S,)
            evidence_ids: the gold answer's ids for each rationale; may be empty. (S,) of (m,)
            answer_spans: first token and length of the answer inside each *completion*. (S,) of pairs
            thinking: for each rationale one flag a *completion* token. (S,) of (completion length,)

        Raises:
            ValueError: naming the argument, the rationale and the sizes that do not fit.
        """
        num_sequences = len(sequence_lengths)
        _check_count("prompt_lengths", prompt_lengths, num_sequences)
        if sum(rationales_per_question) != num_sequences:
            raise ValueError(
                f"rationales_per_question sums to {sum(rationales_per_question)}, "
                f"but sequence_lengths describes {num_sequences} rationales"
            )
        for q, count in enumerate(rationales_per_question):
            if count < 1:
                raise ValueError(f"rationales_per_question[{q}] is {count}: a question needs at least one rationale")
        completions = []
        for s, (length, prompt) in enumerate(zip(sequence_lengths, prompt_lengths)):
            if not 1 <= prompt < length:
                raise ValueError(
                    f"rationale {s}: prompt_lengths is {prompt} and sequence_lengths is {length}; "
                    "at least one prompt token and one completion token are needed"
                )
            completions.append(length - prompt)
        body_lengths = completions if body_lengths is None else body_lengths
        evidence_ids = [()] * num_sequences if evidence_ids is None else evidence_ids
        answer_spans = [(0, 0)] * num_sequences if answer_spans is None else answer_spans
        thinking = [[False] * count for count in completions] if thinking is None else thinking
        _check_count("body_lengths", body_lengths, num_sequences)
        _check_count("evidence_ids", evidence_ids, num_sequences)
        _check_count("answer_spans", answer_spans, num_sequences)
        _check_count("thinking", thinking, num_sequences)

        body_lengths = _whole("body_lengths", body_lengths)
        evidence = _whole("evidence_ids", [token for ids in evidence_ids for token in ids])
        cu_seqlens, cu_rows = _offsets(sequence_lengths), _offsets(completions)
        rows, flags, span_rows, spans = [], [], [], []
        for s, count in enumerate(completions):
            start, length = _whole("answer_spans", answer_spans[s])
            if not 0 <= body_lengths[s] <= count:
                raise ValueError(
                    f"rationale {s}: body_lengths is {body_lengths[s]}, its completion has {count} tokens"
                )
            if start < 0 or length < 0 or start + length > count:
                raise ValueError(
                    f"rationale {s}: answer_spans is ({start}, {length}), its completion has {count} tokens"
                )
            if len(thinking[s]) != count:
                raise ValueError(
                    f"rationale {s}: thinking has {len(thinking[s])} flags, its completion has {count} tokens"
                )
            first_row = int(cu_seqlens[s]) + prompt_lengths[s] - 1
            rows.append(torch.arange(first_row, first_row + count, device="cpu"))
            # Row t has just read completion token t - 1; row 0 has read the prompt, which is never a thinking token.
            flags.append(_host_tensor([False, *thinking[s][:-1]], torch.bool))
            span_rows.append(torch.arange(start, start + length, device="cpu") + int(cu_rows[s]))
            spans.append(length)
        return cls(
            cu_seqlens=cu_seqlens,
            cu_questions=_offsets(rationales_per_question),
            rows=_concatenate(rows, torch.int64),
            cu_rows=cu_rows,
            body_lengths=_host_tensor(body_lengths, torch.int32),
            thinking=_concatenate(flags, torch.bool),
            evidence_ids=_host_tensor(evidence, torch.int64),
            cu_evidence=_offsets([len(ids) for ids in evidence_ids]),
            span_rows=_concatenate(span_rows, torch.int64),
            cu_span=_offsets(spans),
            max_seqlen=max(sequence_lengths, default=0),
        )

    @classmethod
    def from_labels(cls, labels: Tensor, cu_seqlens: Tensor, cu_questions: Tensor, ignore_index: int = -100) -> Ragged:
        """Describe a packed batch by unshifted labels, as other trainers hold them (host tensors).

        Row p is scored where ``labels[p + 1] != ignore_index`` within the same sequence. There is no answer: eq. 3
        and the divergence are zero for such a batch.

        Args:
            labels: (T,) int64, ``ignore_index`` where a token is not a target.
            cu_seqlens: (S+1,) token offsets. cu_questions: (Q+1,) rationale offsets.

        Raises:
            ValueError: what is no tensor of whole numbers, or offsets that do not cover the tokens or rationales.
        """
        for name, given in (("labels", labels), ("cu_seqlens", cu_seqlens), ("cu_questions", cu_questions)):
            kind = given.dtype if isinstance(given, Tensor) else type(given).__name__
            if kind not in (torch.int64, torch.int32) and not (isinstance(given, Tensor) and given.numel() == 0):
                raise ValueError(f"{name} is {kind}; it is a tensor of whole numbers, int64 or int32")
            if name != "labels" and given.dim() != 1:
                raise ValueError(f"{name} has shape {tuple(given.shape)}; offsets are one after the other")
        (ignore_index,) = _whole("ignore_index", [ignore_index])
        labels, cu_seqlens, cu_questions = labels.reshape(-1).cpu(), cu_seqlens.cpu(), cu_questions.cpu()
        _check_offsets("cu_seqlens", cu_seqlens, labels.numel(), "tokens")
        _check_offsets("cu_questions", cu_questions, cu_seqlens.numel() - 1, "rationales")
        # The batch's own: kernels read offsets side by side, and who gave them may write to them again.
        cu_seqlens, cu_questions = (_host_tensor(t.tolist(), torch.int32) for t in (cu_seqlens, cu_questions))
        scored = labels.new_zeros(labels.numel() + 1, dtype=torch.bool)
        scored[: labels.numel()] = labels != ignore_index
        scored[cu_seqlens.long()] = False  # the first token of a sequence is nobody's target
        rows = scored[1:].nonzero().squeeze(1)
        cu_rows = torch.searchsorted(rows, cu_seqlens.long()).int()
        empty, zeros = labels.new_empty(0, dtype=torch.int64), torch.zeros_like(cu_seqlens)
        return cls(
            cu_seqlens=cu_seqlens,
            cu_questions=cu_questions,
            rows=rows,
            cu_rows=cu_rows,
            body_lengths=cu_rows.diff(),
            thinking=torch.zeros_like(rows, dtype=torch.bool),
            evidence_ids=empty,
            cu_evidence=zeros,
            span_rows=empty,
            cu_span=zeros,
            max_seqlen=int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0,
        )

    @property
    def host(self) -> Ragged:
        """The same description in CPU tensors; reading sizes from it never waits for a device."""
        return self if self._host is None else self._host

    @cached_property
    def sizes(self) -> Sizes:
        """The host's offsets as Python numbers, converted once a batch.

        Raises:
            ValueError: parts do not fit each other, or a kernel could not read them.
        """
        for name in _TENSORS:
            if not getattr(self, name).is_contiguous():
                raise ValueError(f"ragged.{name} is not contiguous: kernels read its entries side by side")
        return self.host._sizes

    @cached_property
    def _sizes(self) -> Sizes:
        self._check()
        ids = self.evidence_ids
        return Sizes(
            cu_seqlens=self.cu_seqlens.tolist(),
            cu_questions=self.cu_questions.tolist(),
            cu_rows=self.cu_rows.tolist(),
            cu_span=self.cu_span.tolist(),
            most_rationales=int(self.cu_questions.diff().max()) if self.num_questions else 0,
            longest_answer=int(self.cu_evidence.diff().max()) if self.num_sequences else 0,
            evidence_range=(int(ids.min()), int(ids.max())) if ids.numel() else None,
        )

    def _check(self) -> None:
        """That the parts fit each other, on the host, once a batch: kernels trust them.

        Raises:
            ValueError: naming the field and the sizes.
        """
        rationales, rows = self.num_sequences, self.num_rows
        for name, count, total, least in (
            ("cu_seqlens", rationales, int(self.cu_seqlens[-1]), 1),
            ("cu_questions", self.num_questions, rationales, 1),
            ("cu_rows", rationales, rows, 0),
            ("cu_evidence", rationales, self.evidence_ids.numel(), 0),
            ("cu_span", rationales, self.span_rows.numel(), 0),
        ):
            offsets = getattr(self, name)
            fits = offsets.numel() == count + 1 and int(offsets[0]) == 0 and int(offsets[-1]) == total
            if not fits or bool((offsets.diff() < least).any()):
                steps = "rising" if least else "not falling"
                raise ValueError(
                    f"ragged.{name} must have {count + 1} entries, {steps} from 0 to {total}, got {offsets.tolist()}"
                )
        for name, entries in (("body_lengths", rationales), ("thinking", rows)):
            if getattr(self, name).numel() != entries:
                raise ValueError(f"ragged.{name} has {getattr(self, name).numel()} entries, expected {entries}")
        tokens = int(self.cu_seqlens[-1])
        for name, below in (("rows", tokens), ("span_rows", rows)):
            places = getattr(self, name)
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < below:
                raise ValueError(f"ragged.{name} must lie in 0 … {below - 1}")

    @_once
    def sequence_of_row(self) -> Tensor:
        """The rationale that each scored row belongs to, (N,) int64."""
        return segment_of(self.cu_rows, self.num_rows)

    @_once
    def step_of_row(self) -> Tensor:
        """t of each scored row r_t, (N,) int64."""
        return torch.arange(self.num_rows, device=self.device) - self.cu_rows[:-1][self.sequence_of_row]

    @_once
    def in_body(self) -> Tensor:
        """Whether a scored row has just read a body token: r_1 … r_{B_k}, (N,) bool."""
        return (self.step_of_row >= 1) & (self.step_of_row <= self.body_lengths[self.sequence_of_row])

    @_once
    def question_of_sequence(self) -> Tensor:
        """The question that each rationale belongs to, (S,) int64."""
        return segment_of(self.cu_questions, self.num_sequences)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def num_questions(self) -> int:
        return self.cu_questions.numel() - 1

    @property
    def num_sequences(self) -> int:
        return self.cu_seqlens.numel() - 1

    @property
    def num_rows(self) -> int:
        return self.rows.numel()

    def questions(self, first: int, last: int) -> Ragged:
        """The questions `first` … `last − 1` over the same packed tokens: rows and ids count from the first of theirs,
        tokens from the first of all, so that no op takes it for a whole batch.
        """
        sequences = slice(self.sizes.cu_questions[first], self.sizes.cu_questions[last])

        def part(offsets: str) -> tuple[Tensor, slice]:
            cut = getattr(self, offsets)[sequences.start : sequences.stop + 1]
            inside = slice(*getattr(self.host, offsets)[[sequences.start, sequences.stop]].tolist())
            return cut - inside.start, inside

        cu_rows, rows = part("cu_rows")
        cu_evidence, ids = part("cu_evidence")
        cu_span, span = part("cu_span")
        return replace(
            self,
            cu_seqlens=self.cu_seqlens[sequences.start : sequences.stop + 1],
            cu_questions=self.cu_questions[first : last + 1] - sequences.start,
            rows=self.rows[rows],
            cu_rows=cu_rows,
            body_lengths=self.body_lengths[sequences],
            thinking=self.thinking[rows],
            evidence_ids=self.evidence_ids[ids],
            cu_evidence=cu_evidence,
            span_rows=self.span_rows[span] - rows.start,
            cu_span=cu_span,
            _host=None if self._host is None else self._host.questions(first, last),
        )

    def tensors(self) -> list[Tensor]:
        """Its tensors in the order of their fields."""
        return [getattr(self, name) for name in _TENSORS]

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor], host: Sequence[Tensor]) -> Ragged:
        """The description that :meth:`tensors` took apart, here and on the host."""
        on_host = cls(**dict(zip(_TENSORS, host)))  # type: ignore[arg-type]
        if tensors[0].device.type == "cpu":
            return on_host
        return replace(on_host, **dict(zip(_TENSORS, tensors)), _host=on_host)  # type: ignore[arg-type]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Ragged:
        """A copy on `device` that keeps its host copy."""
        device = torch.device(device)
        if device == self.device:
            return self
        if device.type == "cpu":
            return self.host
        moved = {name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS}
        return replace(self, **moved, _host=self.host)

    def pin_memory(self) -> Ragged:
        """A copy in pinned host memory, for DataLoader's ``pin_memory``."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})


def segment_of(offsets: Tensor, total: int) -> Tensor:
    """The segment of each of `total` places, the last offset: (M+1,) gives (total,) int64 in 0 … M−1."""
    places = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.bucketize(places, offsets[1:], right=True)


def on_device(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host's on a device, by a copy that waits for nothing: on a GPU from pinned memory."""
    host = _host_tensor(values, dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


_TENSORS = tuple(f.name for f in fields(Ragged) if f.name not in ("max_seqlen", "_host"))


def _host_tensor(values: list, dtype: torch.dtype) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.tensor(values, dtype=dtype, device="cpu")


def _offsets(counts: Sequence[int]) -> Tensor:
    return _host_tensor([0, *counts], torch.int64).cumsum(0).int()


def _concatenate(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat(parts).to(dtype) if parts else _host_tensor([], dtype)


def _whole(name: str, numbers: Sequence[SupportsIndex]) -> list[int]:
    """Plain ones of Python's, NumPy's or torch's."""
    try:
        return [index(number) for number in numbers]
    except TypeError:
        raise ValueError(f"{name} holds {list(numbers)}; whole numbers are needed") from None


def _check_count(name: str, values: Sequence[object], expected: int) -> None:
    if len(values) != expected:
        raise ValueError(f"{name} has {len(values)} entries, but sequence_lengths describes {expected} rationales")


def _check_offsets(name: str, offsets: Tensor, total: int, what: str) -> None:
    if offsets.numel() < 1 or offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 1).any():
        raise ValueError(f"{name} must rise from 0 to the {total} {what}, got {offsets.tolist()}")
