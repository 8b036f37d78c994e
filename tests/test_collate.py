import pickle

import datasets
import pytest
import torch

from compact.collate import Collator
from compact.config import DataConfig
from compact.data import load_questions, tokenize_questions
from tests.toy import toy_tokenizer


@pytest.fixture(scope="module")
def items():
    """Three questions with three, one and two rationales, one of them a bare answer."""
    rows = [
        {
            "id": "x",
            "prompt": "How many eggs?",
            "answer": "72",
            "rationales": [
                {"teacher": "a", "completion": "First 36, so 72.\n#### 72"},
                {"teacher": "b", "completion": "Wait. 36 + 36.\n#### 73"},
                {"teacher": "c", "completion": "#### 72"},
            ],
        },
        {
            "id": "y",
            "prompt": "And degrees?",
            "answer": "9",
            "rationales": [{"teacher": "c", "completion": "Because 3 * 3, then 9.\n#### 9"}],
        },
        {
            "id": "z",
            "prompt": "Else?",
            "answer": "5",
            "rationales": [
                {"teacher": "b", "completion": "Five.\n#### 5"},
                {"teacher": "c", "completion": "2 + 3.\n#### 5"},
            ],
        },
    ]
    dataset, report = load_questions(datasets.Dataset.from_list(rows))
    tokens, _ = tokenize_questions(dataset, toy_tokenizer(), DataConfig(suffix_answer="own"), teachers=report.teachers)
    return tokens.to_list()


def unpacked(batch):
    cu = batch["cu_seq_lens_q"].tolist()
    return [
        {key: batch[key][0, a:b].tolist() for key in ("input_ids", "position_ids", "labels")}
        for a, b in zip(cu, cu[1:])
    ]


def test_batch_is_the_rationales_end_to_end_without_padding(items):
    batch = Collator()(items)
    sequences = unpacked(batch)
    rationales = [(item, rationale) for item in items for rationale in item["rationales"]]
    assert len(sequences) == len(rationales) == 6
    for sequence, (item, rationale) in zip(sequences, rationales):
        prompt, completion = item["prompt_ids"], rationale["completion_ids"]
        assert sequence["input_ids"] == prompt + completion
        assert sequence["labels"] == [-100] * len(prompt) + completion
        assert sequence["position_ids"] == list(range(len(prompt) + len(completion)))
    assert batch["teachers"].tolist() == [0, 1, 2, 2, 1, 2]
    assert batch["question_ids"] == ["x", "y", "z"]
    longest = max(len(sequence["input_ids"]) for sequence in sequences)
    assert type(batch["max_length_q"]) is int and batch["max_length_q"] == batch["max_length_k"] == longest
    assert torch.equal(batch["cu_seq_lens_q"], batch["cu_seq_lens_k"])
    dtypes = {key: batch[key].dtype for key in ("input_ids", "position_ids", "labels", "cu_seq_lens_q", "teachers")}
    assert list(dtypes.values()) == [torch.int64, torch.int64, torch.int64, torch.int32, torch.int64]
    assert "unconditional" not in batch and "embeddings" not in batch


def test_ragged_describes_the_batch(items):
    batch = Collator()(items)
    ragged, ids = batch["ragged"], batch["input_ids"][0]
    assert ragged.cu_questions.tolist() == [0, 3, 4, 6]
    assert torch.equal(ragged.cu_seqlens, batch["cu_seq_lens_q"])
    targets = ids[ragged.rows + 1]
    assert torch.equal(targets, batch["labels"][batch["labels"] != -100])  # a scored row predicts each target once
    s = 0
    for item in items:
        for rationale in item["rationales"]:
            rows = slice(*ragged.cu_rows[s : s + 2].tolist())
            assert targets[rows].tolist() == rationale["completion_ids"]
            assert ragged.body_lengths[s] == rationale["body_length"]
            assert ragged.evidence_ids[slice(*ragged.cu_evidence[s : s + 2].tolist())].tolist() == item["evidence_ids"]
            span = ragged.span_rows[slice(*ragged.cu_span[s : s + 2].tolist())]
            start, length = rationale["answer_start"], rationale["answer_length"]
            assert targets[span].tolist() == rationale["completion_ids"][start : start + length]
            assert ragged.thinking[rows].tolist() == [False, *rationale["thinking"][:-1]]
            s += 1
    assert s == ragged.num_sequences == 6


def test_unconditional_batch_is_the_completions_after_one_token(items):
    for tokenizer, start in [(toy_tokenizer(), 1), (toy_tokenizer(), 2)]:
        if start == 2:
            tokenizer.bos_token = None  # then EOS
        batch = Collator(tokenizer, ifd=True)(items)
        alone = batch["unconditional"]
        for sequence, rationale in zip(unpacked(alone), (r for item in items for r in item["rationales"])):
            assert sequence["input_ids"] == [start, *rationale["completion_ids"]]
            assert sequence["labels"] == [-100, *rationale["completion_ids"]]
        assert alone["ragged"].num_rows == batch["ragged"].num_rows
        assert set(alone) | {"unconditional"} == set(batch)


def test_embeddings_ride_along(items):
    with_embeddings = [
        {**item, "rationales": [{**r, "embedding": [float(i), 0.5]} for i, r in enumerate(item["rationales"])]}
        for item in items
    ]
    batch = Collator()(with_embeddings)
    assert batch["embeddings"].dtype == torch.float32
    assert batch["embeddings"].tolist() == [[0, 0.5], [1, 0.5], [2, 0.5], [0, 0.5], [0, 0.5], [1, 0.5]]


def test_collator_goes_to_data_loader_workers(items):
    collator = pickle.loads(pickle.dumps(Collator(toy_tokenizer(), ifd=True)))
    assert vars(collator) == {"start_id": 1}
    loader = torch.utils.data.DataLoader(items, batch_size=2, collate_fn=collator)
    assert [batch["question_ids"] for batch in loader] == [["x", "y"], ["z"]]
