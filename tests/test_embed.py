"""Sentence embeddings of rationales, and the consensus graph that is drawn from them."""

from __future__ import annotations

import math

import datasets
import networkx
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from compact.config import DataConfig
from compact.data import load_questions, tokenize_questions
from compact.embed import embed_rationales
from compact.errors import UserError
from compact.metrics import read_metrics
from tests.toy import SENTENCES, toy_tokenizer
from tests.toy_run import toy_model, toy_rows, toy_trainer

WORDS = sorted({word for text in SENTENCES for word in text.replace("\n", " ").split()} | set("0123456789+=#.,"))


def save_encoder(folder, seed=0, context=64):
    """A random BERT of words; every number is one unknown word or its digits."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=context, **names).save_pretrained(folder)
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(vocabulary), max_position_embeddings=context, **sizes))
    for parameter in model.parameters():
        parameter.data.mul_(8)  # so that different texts are clearly different
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def tokenized(rows, **options):
    questions, _ = load_questions(datasets.Dataset.from_list(rows))
    return tokenize_questions(questions, toy_tokenizer(), DataConfig(**options))[0]


def body(text):
    return {"completion": f"{text}\n#### 72"}


def test_an_embedding_is_the_mean_state_of_the_body_and_nothing_else(encoder):
    texts = ["First he has 12 eggs, so 12 + 36 = 48.", "Then 5 * 10 = 50 degrees, hence 32 + 50 = 82."]
    rows = [
        {"id": str(i), "prompt": f"q{i}?", "answer": "72", "rationales": [{"teacher": "a", **body(text)}]}
        for i, text in enumerate(texts)
    ]
    embedded = embed_rationales(tokenized(rows), toy_tokenizer(), encoder)
    model, tokenizer = BertModel.from_pretrained(encoder).eval(), PreTrainedTokenizerFast.from_pretrained(encoder)
    for item, text in zip(embedded, texts):
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = states.mean(0) / states.mean(0).norm()
        assert torch.tensor(item["rationales"][0]["embedding"]) == pytest.approx(expected, abs=1e-5)


def test_mind_s_feature_is_that_of_question_and_rationale_together(encoder, tmp_path):
    method = {"strategy": "mind", "mind": {"features": "sentence"}, "consensus": {"encoder": encoder}}
    trainer = toy_trainer(tmp_path, questions=6, method=method)
    model, reader = BertModel.from_pretrained(encoder).eval(), PreTrainedTokenizerFast.from_pretrained(encoder)
    for item in trainer.train_dataset:
        for rationale in item["rationales"]:
            ids = item["prompt_ids"], rationale["completion_ids"][: rationale["body_length"]]
            text = "\n".join(toy_tokenizer().decode(part, skip_special_tokens=True).strip() for part in ids)
            with torch.no_grad():
                state = model(**reader(text, return_tensors="pt")).last_hidden_state[0].mean(0)
            assert rationale["embedding"] == pytest.approx((state / state.norm()).tolist(), abs=1e-5)
    trainer.train()
    assert trainer.strategy.net.encode[0].normalized_shape == (24,)  # the encoder's width, not the student's


def test_everything_else_of_the_items_stays(encoder):
    plain = tokenized(toy_rows(5))
    embedded = embed_rationales(plain, toy_tokenizer(), encoder)
    for before, after in zip(plain, embedded, strict=True):
        for rationale in after["rationales"]:
            assert math.hypot(*rationale.pop("embedding")) == pytest.approx(1, abs=1e-6)
        assert before == after


def test_identical_texts_have_identical_embeddings_and_empty_ones_too(encoder):
    rationales = [{"teacher": name, **body("First 36, then 72.")} for name in ("a", "b")]
    rationales += [{"teacher": name, "completion": "#### 72"} for name in ("c", "d")]
    rows = [{"id": "x", "prompt": "How many?", "answer": "72", "rationales": rationales}]
    rows += [{"id": "y", "prompt": "And here?", "answer": "72", "rationales": rationales[:1]}]
    embedded = embed_rationales(tokenized(rows), toy_tokenizer(), encoder)
    a, b, c, d = (rationale["embedding"] for rationale in embedded[0]["rationales"])
    assert a == b == embedded[1]["rationales"][0]["embedding"] and c == d
    assert a != c and all(math.isfinite(value) for value in c)


def test_batching_changes_no_embedding(encoder):
    plain = tokenized(toy_rows(12))
    one, many = (embed_rationales(plain, toy_tokenizer(), encoder, batch_size=size) for size in (1, 64))
    for a, b in zip(one, many, strict=True):
        for x, y in zip(a["rationales"], b["rationales"]):
            assert x["embedding"] == pytest.approx(y["embedding"], abs=1e-5)


def test_the_file_is_reused_until_encoder_or_questions_change(encoder, tmp_path):
    plain, other = tokenized(toy_rows(4)), save_encoder(tmp_path / "other", seed=1)
    cache = tmp_path / "cache"

    def files():
        return sorted(path.name for path in cache.iterdir())

    first = embed_rationales(plain, toy_tokenizer(), encoder, cache_dir=cache)
    written, made = files(), next(cache.iterdir()).stat().st_mtime_ns
    assert first.cache_files and [name.split("-")[0] for name in written] == ["embeddings"]
    embed_rationales(plain, toy_tokenizer(), encoder, cache_dir=cache)
    assert files() == written and next(cache.iterdir()).stat().st_mtime_ns == made
    second = embed_rationales(plain, toy_tokenizer(), other, cache_dir=cache)
    assert len(files()) == 2
    assert first[0]["rationales"][0]["embedding"] != second[0]["rationales"][0]["embedding"]
    embed_rationales(tokenized(toy_rows(3)), toy_tokenizer(), encoder, cache_dir=cache)
    assert len(files()) == 3


def test_of_a_body_that_is_too_long_the_beginning_is_read_and_that_is_said(tmp_path, caplog):
    encoder = save_encoder(tmp_path, context=16)
    rationales = [{"teacher": "a", **body("so " * 40)}, {"teacher": "b", **body("so " * 14 + "we divide")}]
    rationales += [{"teacher": "c", **body("so " * 14)}]  # with [CLS] and [SEP] exactly 16
    rows = [{"id": "x", "prompt": "How many?", "answer": "72", "rationales": rationales}]
    embedded = embed_rationales(tokenized(rows), toy_tokenizer(), encoder)
    a, b, c = (rationale["embedding"] for rationale in embedded[0]["rationales"])
    assert a == pytest.approx(c, abs=1e-6) and b == pytest.approx(c, abs=1e-6)
    assert "reads 16 tokens at once: of 2 of 3 rationales only the beginning" in caplog.text


def test_consensus_is_that_of_the_graph_of_cosines(encoder, tmp_path):
    settings = {"affinity": "sentence", "encoder": encoder, "temperature": 0.2}
    trainer = toy_trainer(tmp_path, questions=6, method={"consensus": settings})
    items = list(trainer.train_dataset)
    trainer.model.eval()
    result = trainer.compute_loss(trainer.model, trainer.data_collator(items), True)[1]
    expected = []
    for item in items:
        vectors = [rationale["embedding"] for rationale in item["rationales"]]
        graph = networkx.DiGraph()
        for i, v in enumerate(vectors):
            weights = [math.exp(sum(x * y for x, y in zip(v, w)) / 0.2) for w in vectors]
            graph.add_weighted_edges_from((i, j, w / sum(weights)) for j, w in enumerate(weights) if i != j)
        scores = dict(graph.in_degree(weight="weight"))
        expected += [scores[i] for i in range(len(vectors))]
    assert result.statistics.consensus.tolist() == pytest.approx(expected, abs=1e-4)


def test_another_encoder_gives_other_weights(encoder, tmp_path):
    alphas = []
    for i, folder in enumerate((encoder, save_encoder(tmp_path / "other", seed=1))):
        method = {"consensus": {"affinity": "sentence", "encoder": folder}}
        trainer = toy_trainer(tmp_path / str(i), questions=9, method=method)
        trainer.model.eval()
        batch = trainer.data_collator(list(trainer.train_dataset))
        alphas.append(trainer.compute_loss(trainer.model, batch, True)[1].alpha)
    assert float((alphas[0] - alphas[1]).abs().max()) > 0.01


def test_a_trainer_trains_with_it_and_refuses_to_guess_an_encoder(encoder, tmp_path):
    method = {"consensus": {"affinity": "sentence", "encoder": encoder}}
    toy_trainer(tmp_path / "run", questions=8, method=method).train()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert len(rows) == 2 and rows[0]["spread"]["consensus"] > 0
    with pytest.raises(UserError, match="consensus.encoder"):
        toy_trainer(tmp_path / "none", questions=8, method={"consensus": {"affinity": "sentence"}})


def test_what_is_no_sentence_encoder_is_refused_with_the_reason(encoder, tmp_path):
    plain = tokenized(toy_rows(2))

    def refused(folder, reason):
        with pytest.raises(UserError, match=reason) as caught:
            embed_rationales(plain, toy_tokenizer(), str(folder))
        assert f"consensus.encoder={folder}" in str(caught.value)
        assert "sentence encoder" in str(caught.value)

    refused(tmp_path / "nothing", "not an encoder that transformers can load")
    toy_model().save_pretrained(tmp_path / "student")
    toy_tokenizer().save_pretrained(tmp_path / "student")
    refused(tmp_path / "student", "LlamaModel reads from left to right")
    save_encoder(tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pickled" / "pytorch_model.bin")
    refused(tmp_path / "pickled", "safetensors")
    save_encoder(tmp_path / "hollow")
    weights = load_file(tmp_path / "hollow" / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "hollow" / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "hollow", "weights lack 1 .* such as encoder.layer.1.output.dense.weight")
