"""The shape of a batch: what is scored, what belongs to whom, and what a wrong description is told."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from compact_kernels import Ragged
from compact_kernels.ragged import segment_of
from compact_kernels.rule import question_softmax

# Two questions; p: prompt, b: body, a: answer, e: end. The rationales: p p b b a e | p p a a e | p b e
GOOD: dict[str, Any] = {
    "sequence_lengths": [6, 5, 3],
    "prompt_lengths": [2, 2, 1],
    "rationales_per_question": [2, 1],
    "body_lengths": [2, 0, 1],
    "evidence_ids": [[7], [7], []],
    "answer_spans": [(2, 1), (0, 2), (1, 0)],
    "thinking": [[True, False, False, True], [False, False, False], [True, True]],
}


def contents(ragged: Ragged) -> dict[str, list]:
    return {f.name: getattr(ragged, f.name).tolist() for f in fields(ragged) if f.name not in ("max_seqlen", "_host")}


def test_a_described_batch_has_these_contents():
    ragged = Ragged.build(**GOOD)
    assert contents(ragged) == {
        "cu_seqlens": [0, 6, 11, 14],
        "cu_questions": [0, 2, 3],
        "rows": [1, 2, 3, 4, 7, 8, 9, 11, 12],  # from the last token of the prompt to the one before the end
        "cu_rows": [0, 4, 7, 9],
        "body_lengths": [2, 0, 1],
        # at the row that has read the token; the end's flag (True, twice) has no row
        "thinking": [False, True, False, False, False, False, False, False, True],
        "evidence_ids": [7, 7],
        "cu_evidence": [0, 1, 2, 2],
        "span_rows": [2, 4, 5],  # into rows: positions 3, 7 and 8 predict the answers' tokens at 4, 8 and 9
        "cu_span": [0, 1, 3, 3],
    }
    assert (ragged.num_questions, ragged.num_sequences, ragged.num_rows, ragged.max_seqlen) == (2, 3, 9, 6)
    for name in ("rows", "evidence_ids", "span_rows"):
        assert getattr(ragged, name).dtype == torch.int64
    for name in ("cu_seqlens", "cu_questions", "cu_rows", "cu_evidence", "cu_span", "body_lengths"):
        assert getattr(ragged, name).dtype == torch.int32
    assert ragged.thinking.dtype == torch.bool


def test_rows_and_rationales_know_where_they_belong():
    ragged = Ragged.build(**GOOD)
    assert ragged.sequence_of_row.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    assert ragged.step_of_row.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert ragged.in_body.tolist() == [False, True, True, False, False, False, False, False, True]
    assert ragged.question_of_sequence.tolist() == [0, 0, 1]
    assert ragged.sequence_of_row is ragged.sequence_of_row  # found once
    assert ragged.questions(1, 2).sequence_of_row.tolist() == [0, 0]  # of a part, not of the whole
    empty = torch.tensor([0, 0, 2, 2, 3, 3], dtype=torch.int32)
    assert segment_of(empty, 3).tolist() == [1, 1, 3] and segment_of(empty[:1], 0).tolist() == []
    for places in (ragged.sequence_of_row, ragged.step_of_row, ragged.question_of_sequence):
        assert places.dtype == torch.int64


def test_what_was_found_in_inference_mode_may_be_in_a_graph():
    ragged = Ragged.build(**GOOD)
    found = ("sequence_of_row", "step_of_row", "in_body", "question_of_sequence")
    with torch.inference_mode():
        assert not any(getattr(ragged, name).is_inference() for name in found)
    scores = torch.zeros(3, requires_grad=True)
    question_softmax(scores, ragged)[0].backward()
    assert scores.grad.tolist() == [0.25, -0.25, 0.0]


def test_a_rationale_without_details_is_all_body_without_an_answer():
    short = {name: GOOD[name] for name in ("sequence_lengths", "prompt_lengths", "rationales_per_question")}
    ragged = Ragged.build(**short)
    assert ragged.body_lengths.tolist() == [4, 3, 2]
    assert ragged.rows.tolist() == Ragged.build(**GOOD).rows.tolist()
    assert not ragged.thinking.any() and ragged.thinking.numel() == 9
    assert ragged.evidence_ids.numel() == ragged.span_rows.numel() == 0
    assert ragged.cu_span.tolist() == ragged.cu_evidence.tolist() == [0] * 4


def test_no_questions_are_a_batch():
    ragged = Ragged.build(sequence_lengths=[], prompt_lengths=[], rationales_per_question=[])
    assert (ragged.num_questions, ragged.num_sequences, ragged.num_rows, ragged.max_seqlen) == (0, 0, 0, 0)
    assert ragged.rows.dtype == torch.int64


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"prompt_lengths has 2 .*3", {"prompt_lengths": [2, 2]}),
        (r"body_lengths has 4 .*3", {"body_lengths": [2, 0, 1, 1]}),
        (r"evidence_ids has 1 .*3", {"evidence_ids": [[7]]}),
        (r"answer_spans has 0 .*3", {"answer_spans": []}),
        (r"thinking has 2 .*3", {"thinking": GOOD["thinking"][:2]}),
        (r"rationales_per_question sums to 4.*3", {"rationales_per_question": [2, 2]}),
        (r"rationales_per_question\[1\] is 0", {"rationales_per_question": [2, 0, 1]}),
        (r"rationale 0: prompt_lengths is 0 and sequence_lengths is 6", {"prompt_lengths": [0, 2, 1]}),
        (r"rationale 2: prompt_lengths is 3 and sequence_lengths is 3", {"prompt_lengths": [2, 2, 3]}),
        (r"rationale 1: body_lengths is 4.* 3 tokens", {"body_lengths": [2, 4, 1]}),
        (r"rationale 2: body_lengths is -1.* 2 tokens", {"body_lengths": [2, 0, -1]}),
        (r"rationale 0: answer_spans is \(3, 2\).* 4 tokens", {"answer_spans": [(3, 2), (0, 2), (1, 0)]}),
        (r"rationale 1: answer_spans is \(-1, 2\).* 3 tokens", {"answer_spans": [(2, 1), (-1, 2), (1, 0)]}),
        (r"rationale 2: answer_spans is \(1, -1\).* 2 tokens", {"answer_spans": [(2, 1), (0, 2), (1, -1)]}),
        (r"body_lengths holds \[1.9, 0, 1\]; whole", {"body_lengths": [1.9, 0, 1]}),
        (r"answer_spans holds \[0.5, 1\]; whole", {"answer_spans": [(0.5, 1), (0, 2), (1, 0)]}),
        (r"rationale 1: thinking has 1 .* 3 tokens", {"thinking": [GOOD["thinking"][0], [True], [True, True]]}),
    ],
)
def test_a_description_that_does_not_fit_names_the_argument_and_the_sizes(message, changes):
    with pytest.raises(ValueError, match=message):
        Ragged.build(**GOOD | changes)


def test_labels_describe_a_batch_whose_first_tokens_are_nobodys_targets():
    i = -100
    labels = torch.tensor([[5, i, 8, 9, 4, i, i, i, 3, i, 2]])
    ragged = Ragged.from_labels(labels, torch.tensor([0, 4, 8, 11]), torch.tensor([0, 1, 3]))
    # 4, at position 4, begins a sequence: it is no target of position 3. The 3 at position 8 likewise.
    assert contents(ragged) == {
        "cu_seqlens": [0, 4, 8, 11],
        "cu_questions": [0, 1, 3],
        "rows": [1, 2, 9],
        "cu_rows": [0, 2, 2, 3],
        "body_lengths": [2, 0, 1],
        "thinking": [False] * 3,
        "evidence_ids": [],
        "cu_evidence": [0] * 4,
        "span_rows": [],
        "cu_span": [0] * 4,
    }
    assert ragged.max_seqlen == 4
    assert ragged.rows.dtype == torch.int64 and ragged.cu_seqlens.dtype == torch.int32
    other = Ragged.from_labels(labels.where(labels != i, 0), ragged.cu_seqlens, ragged.cu_questions, ignore_index=0)
    assert contents(other) == contents(ragged)


def test_whole_numbers_may_be_numpys_or_torchs():
    given = {name: [torch.tensor(n) for n in GOOD[name]] for name in ("sequence_lengths", "body_lengths")}
    given["evidence_ids"] = [list(np.array(ids, dtype=np.int32)) for ids in GOOD["evidence_ids"]]
    assert contents(Ragged.build(**GOOD | given)) == contents(Ragged.build(**GOOD))


def test_offsets_that_are_given_are_copied_side_by_side():
    labels = torch.arange(8)
    given = [torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 4, 8], [0, 2])]
    wanted = contents(Ragged.from_labels(labels, *given))
    strided = [torch.stack([offsets, torch.full_like(offsets, 7)], -1)[..., 0] for offsets in given]
    ragged = Ragged.from_labels(labels, *strided)
    assert ragged.cu_seqlens.is_contiguous() and ragged.cu_questions.is_contiguous()
    for offsets in strided:
        offsets.zero_()
    assert contents(ragged) == wanted
    for offsets in given:
        offsets.zero_()
    strided = torch.stack([ragged.cu_rows] * 2, -1)[..., 0]
    for made in (
        dataclasses.replace(ragged, cu_rows=strided),
        dataclasses.replace(ragged, cu_rows=strided, _host=ragged),
    ):
        with pytest.raises(ValueError, match="ragged.cu_rows is not contiguous"):
            _ = made.sizes
    with pytest.raises(ValueError, match="ignore_index holds .None.; whole numbers"):
        Ragged.from_labels(labels, ragged.cu_seqlens, ragged.cu_questions, ignore_index=None)
    with pytest.raises(ValueError, match="cu_questions must rise from 0 to the 2 rationales"):
        Ragged.from_labels(labels, ragged.cu_seqlens, torch.tensor([0, 2 + 2**32]))


def test_labels_and_lengths_agree_about_the_rows():
    built = Ragged.build(**GOOD)
    labels = torch.full((14,), -100)
    labels[built.rows + 1] = 1
    ragged = Ragged.from_labels(labels, built.cu_seqlens, built.cu_questions)
    for name in ("cu_seqlens", "cu_questions", "rows", "cu_rows"):
        assert torch.equal(getattr(ragged, name), getattr(built, name))


@pytest.mark.parametrize(
    ("message", "sequences", "questions"),
    [
        (r"cu_seqlens.*6 tokens.*\[0, 5\]", [0, 5], [0, 1]),
        (r"cu_seqlens.*6 tokens.*\[1, 6\]", [1, 6], [0, 1]),
        (r"cu_seqlens.*\[0, 4, 4, 6\]", [0, 4, 4, 6], [0, 3]),
        (r"cu_seqlens.*\[\]", [], [0]),
        (r"cu_questions.*2 rationales.*\[0, 3\]", [0, 2, 6], [0, 3]),
        (r"cu_questions.*\[0, 2, 1, 2\]", [0, 2, 6], [0, 2, 1, 2]),
    ],
)
def test_offsets_that_do_not_fit_the_labels_are_named(message, sequences, questions):
    with pytest.raises(ValueError, match=message):
        Ragged.from_labels(torch.zeros(6, dtype=torch.int64), torch.tensor(sequences), torch.tensor(questions))


def test_a_batch_on_a_device_keeps_its_host_copy():
    ragged = Ragged.build(**GOOD)
    assert ragged.host is ragged and ragged.to("cpu") is ragged
    moved = ragged.to("meta", non_blocking=True)
    assert moved.device.type == "meta" and moved.host is ragged and moved.to("cpu") is ragged
    assert {getattr(moved, name).device.type for name in contents(ragged)} == {"meta"}
    assert (moved.num_questions, moved.num_sequences, moved.num_rows, moved.max_seqlen) == (2, 3, 9, 6)
    assert moved.to("meta") is moved


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs an accelerator")
def test_a_pinned_batch_is_the_same_batch():
    ragged = Ragged.build(**GOOD)
    pinned = ragged.pin_memory()
    assert pinned.rows.is_pinned() and contents(pinned) == contents(ragged)
    assert contents(pinned.to("cuda", non_blocking=True).host) == contents(ragged)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cu_questions", [0, 2]),
        ("cu_questions", [0, 2, 2, 3]),
        ("cu_rows", [0, 2, 4, 5]),
        ("cu_seqlens", [0, 4, 4, 10]),
        ("rows", [0, 1, 2, 3, 4, 99]),
    ],
)
def test_parts_that_do_not_fit_are_named_before_a_kernel_reads_them(field, value):
    ragged = Ragged.build(sequence_lengths=[3, 3, 4], prompt_lengths=[1, 1, 2], rationales_per_question=[2, 1])
    broken = dataclasses.replace(ragged, **{field: torch.tensor(value, dtype=getattr(ragged, field).dtype)})
    with pytest.raises(ValueError, match=f"ragged.{field}"):
        _ = broken.sizes
