import re

import datasets
import pytest
from transformers import ByT5Tokenizer

from compact.config import DataConfig
from compact.data import load_questions, tokenize_questions
from compact.errors import UserError
from compact.tokenization import encode
from tests.toy import toy_tokenizer

BODIES = {"a": "So he has 36 eggs. However, also 36 more; THEREFORE we add.", "b": "Wait: 36 + 36.\nThen stop."}


def questions(answer="72", prompt="How many eggs?", **completions):
    completions = completions or {name: f"{body}\n#### {answer}" for name, body in BODIES.items()}
    rationales = [{"teacher": name, "completion": text} for name, text in completions.items()]
    rows = [{"id": "1", "prompt": prompt, "answer": answer, "rationales": rationales}]
    return load_questions(datasets.Dataset.from_list(rows))[0]


def tokenize(dataset, tokenizer=None, **options):
    items, report = tokenize_questions(dataset, tokenizer or toy_tokenizer(), DataConfig(**options))
    return items[0], report


def words_at(tokenizer, ids, flags):
    return [tokenizer.decode([token]).strip() for token, flag in zip(ids, flags) if flag]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("answer", ["72", "1,234", "-3.5", "naïve 数字", "x"])
def test_completion_is_body_suffix_and_eos_with_the_answer_found_in_it(chat, answer):
    tokenizer = toy_tokenizer(chat)
    dataset = questions(answer=answer) if answer[-1].isdigit() else None
    if dataset is None:
        rows = [
            {
                "id": "1",
                "prompt": "?",
                "answer": answer,
                "task": "text",
                "rationales": [{"teacher": name, "completion": body} for name, body in BODIES.items()],
            }
        ]
        dataset, _ = load_questions(datasets.Dataset.from_list(rows))
    item, report = tokenize(dataset, tokenizer)
    suffixes = set()
    for rationale, body in zip(item["rationales"], BODIES.values()):
        ids, length = rationale["completion_ids"], rationale["body_length"]
        assert tokenizer.decode(ids[:length]) == body if chat else " " + body
        assert tokenizer.decode(ids[length:-1]) == f"\nThe answer is {answer}."
        assert ids[-1] == tokenizer.eos_token_id
        span = ids[rationale["answer_start"] :][: rationale["answer_length"]]
        assert tokenizer.decode(span).strip(" .") == answer
        assert span == item["evidence_ids"]
        assert len(rationale["thinking"]) == len(ids) and not any(rationale["thinking"][length:])
        suffixes.add((tuple(ids[length:]), rationale["answer_start"] - length))
    assert len(suffixes) == 1  # the same ids in every rationale
    assert report.teachers == ["a", "b"] and [r["teacher"] for r in item["rationales"]] == [0, 1]


def test_tokens_that_overlap_the_answer_and_no_others_count_as_it():
    tokenizer = toy_tokenizer()
    for answer in ["72", "yes", "C", "1036", "9", "eggs"]:
        for suffix in ["\nThe answer is {answer}.", "#### {answer}", "({answer})", "\nThe answer is ({answer})."]:
            rows = [
                {
                    "id": "1",
                    "prompt": "?",
                    "answer": answer,
                    "task": "text",
                    "rationales": [{"teacher": "a", "completion": "So."}],
                }
            ]
            item, _ = tokenize(load_questions(datasets.Dataset.from_list(rows))[0], suffix=suffix)
            (rationale,) = item["rationales"]
            start, length = rationale["answer_start"] - rationale["body_length"], rationale["answer_length"]
            ids = rationale["completion_ids"][rationale["body_length"] :]
            begin = len(suffix.split("{answer}")[0])
            ends = [len(tokenizer.decode(ids[: i + 1])) for i in range(len(ids) - 1)]
            overlapping = [
                i for i, end in enumerate(ends) if end > begin and (ends[i - 1] if i else 0) < begin + len(answer)
            ]
            assert overlapping == list(range(start, start + length))


def test_thinking_words_are_whole_words_in_any_case_on_their_first_token():
    tokenizer = toy_tokenizer()
    item, _ = tokenize(questions())
    first, second = item["rationales"]
    text = BODIES["a"]
    assert [match.group() for match in re.finditer(r"\b(So|However|THEREFORE)\b", text)] == [
        "So",
        "However",
        "THEREFORE",
    ]
    marked = [i for i, flag in enumerate(first["thinking"]) if flag]
    rest = [tokenizer.decode(first["completion_ids"][i : first["body_length"]]).lstrip() for i in marked]
    assert [text.endswith(tail) and tail[:2] for tail in rest] == ["So", "Ho", "TH"]
    marked = words_at(tokenizer, second["completion_ids"], second["thinking"])
    assert len(marked) == 2 and "Wait".startswith(marked[0]) and "Then".startswith(marked[1])


def test_thinking_words_are_found_by_text_and_not_by_token():
    body = "Also the sosoon sofa is so."
    item, _ = tokenize(questions(a=f"{body}\n#### 72"))
    (rationale,) = item["rationales"]
    (marked,) = [i for i, flag in enumerate(rationale["thinking"]) if flag]
    assert toy_tokenizer().decode(rationale["completion_ids"][marked : rationale["body_length"]]).lstrip() == "so."
    assert not any(tokenize(questions(a=f"{body}\n#### 72"), thinking_words=[])[0]["rationales"][0]["thinking"])
    blank, _ = tokenize(questions(a=f"{body}\n#### 72"), thinking_words=["so", "", " "])
    assert blank["rationales"][0]["thinking"] == rationale["thinking"]
    accented, _ = tokenize(questions(a="Ça, également: 3.\n#### 72"), thinking_words=["également"])
    (flags,) = [r["thinking"] for r in accented["rationales"]]
    assert sum(flags) == 1


def test_overlong_body_is_cut_at_its_end_and_never_the_suffix():
    whole, _ = tokenize(questions())
    longest = max(len(r["completion_ids"]) for r in whole["rationales"])
    limit = len(whole["prompt_ids"]) + longest - 5
    cut, report = tokenize(questions(), max_length=limit)
    before, after = whole["rationales"][0], cut["rationales"][0]
    assert after["cut"] and after["body_length"] == before["body_length"] - 5
    assert len(cut["prompt_ids"]) + len(after["completion_ids"]) == limit
    assert after["completion_ids"][: after["body_length"]] == before["completion_ids"][: after["body_length"]]
    assert after["completion_ids"][after["body_length"] :] == before["completion_ids"][before["body_length"] :]
    assert after["thinking"][: after["body_length"]] == before["thinking"][: after["body_length"]]
    assert after["answer_start"] == before["answer_start"] - 5
    assert cut["rationales"][1] == whole["rationales"][1]
    assert report.rationales["cut"] == 1 and report.rationales["used"] == 2

    dropped, report = tokenize(questions(), max_length=limit, overlong="drop")
    assert [r["teacher"] for r in dropped["rationales"]] == [1]
    assert report.rationales["refused"] == 1 and "question '1', teacher 'a': too long" in report.reasons[0]


def test_a_cut_leaves_every_character_whole():
    tokenizer = toy_tokenizer()
    for limit in range(45, 75):
        item, _ = tokenize(questions(a="Add 🙂🙂 数字 all of them.\n#### 72"), max_length=limit)
        assert "\ufffd" not in tokenizer.decode(item["rationales"][0]["completion_ids"])


def test_a_body_that_is_read_as_the_end_of_a_sequence_is_refused_by_name(monkeypatch):
    tokenizer = toy_tokenizer()
    monkeypatch.setattr(
        "compact.tokenization.encode",
        lambda tokenizer, texts, real=encode: [
            ([*ids[:2], tokenizer.eos_token_id, *ids[3:]] if "tags" in text else ids, offsets)
            for text, (ids, offsets) in zip(texts, real(tokenizer, texts))
        ],
    )  # as Unigram tokenizers do, in whose vocabulary it stands
    item, report = tokenize(questions(a="Some tags here.\n#### 72", b="Right.\n#### 72"), tokenizer)
    assert [rationale["teacher"] for rationale in item["rationales"]] == [1]
    assert "teacher 'a': its text is read as the end of a sequence" in report.reasons[0]


def test_suffix_longer_than_the_context_is_named_with_the_way_out():
    with pytest.raises(UserError) as error:
        tokenize(questions(), max_length=8)
    for part in ("prompt and suffix alone are longer than data.max_length", "> 8 tokens", "shorten data.suffix"):
        assert part in str(error.value)


def test_question_without_room_for_any_body_is_refused_and_a_bare_answer_is_not():
    item, _ = tokenize(questions())
    exact = (
        len(item["prompt_ids"]) + len(item["rationales"][0]["completion_ids"]) - item["rationales"][0]["body_length"]
    )
    with pytest.raises(UserError, match="no room for a body"):
        tokenize(questions(), max_length=exact)
    item, report = tokenize(questions(a="#### 72"), max_length=exact)
    assert item["rationales"][0]["body_length"] == 0 and report.rationales["cut"] == 0


def test_own_suffix_holds_the_teachers_answer_and_evidence_stays_gold():
    dataset = questions(a="Sum.\n#### 72.0", wrong="Sum.\n#### 1036", unknown="Sum.")
    tokenizer = toy_tokenizer()
    gold, _ = tokenize(dataset)
    own, _ = tokenize(dataset, suffix_answer="own")
    assert own["evidence_ids"] == gold["evidence_ids"]
    assert own["rationales"][0] == gold["rationales"][0]  # 72.0 is 72: spelt as the gold answer, so spans align
    assert own["rationales"][2] == gold["rationales"][2]
    wrong = own["rationales"][1]
    assert tokenizer.decode(wrong["completion_ids"]).endswith("\nThe answer is 1036.</s>")
    span = wrong["completion_ids"][wrong["answer_start"] :][: wrong["answer_length"]]
    assert tokenizer.decode(span).strip() == "1036" and wrong["wrong"]
    assert tokenizer.decode(gold["rationales"][1]["completion_ids"]).endswith("\nThe answer is 72.</s>")


def test_wrong_answers_may_be_dropped():
    item, report = tokenize(questions(a="Sum.\n#### 72", b="Sum.\n#### 73"), wrong_answers="drop")
    assert [r["teacher"] for r in item["rationales"]] == [0]
    assert report.rationales["refused"] == report.rationales["wrong"] == 1
    with pytest.raises(UserError, match="wrong answer"):
        tokenize(questions(b="Sum.\n#### 73"), wrong_answers="drop")


def test_prompts_go_through_the_chat_template_or_the_plain_one():
    tokenizer = toy_tokenizer(chat_template=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}]
    item, _ = tokenize(questions(prompt="How many?"), tokenizer)
    assert tokenizer.decode(item["prompt_ids"]) == "<|start|>user\nHow many?<|end|>\n<|start|>assistant\n"
    item, _ = tokenize(questions(prompt=messages), tokenizer)
    assert tokenizer.decode(item["prompt_ids"]).startswith("<|start|>system\nBe brief.<|end|>\n<|start|>user\n")
    plain = toy_tokenizer()
    item, _ = tokenize(questions(prompt="How many?"), plain)
    assert plain.decode(item["prompt_ids"]) == "Question: How many?\nAnswer:"
    item, _ = tokenize(questions(prompt=messages[1:]), plain)
    assert plain.decode(item["prompt_ids"]) == "Question: How many?\nAnswer:"
    item, _ = tokenize(questions(prompt=messages), plain)
    assert plain.decode(item["prompt_ids"]) == "Question: System: Be brief.\nUser: How many?\nAnswer:"
    item, _ = tokenize(questions(), toy_tokenizer(add_bos=True))
    assert item["prompt_ids"][0] == 1 and 1 not in item["prompt_ids"][1:]
    assert 1 not in item["rationales"][0]["completion_ids"]


def test_chat_template_that_refuses_a_role_names_the_question():
    tokenizer = toy_tokenizer(chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match="question '1': .*no system role"):
        tokenize(questions(), tokenizer)


def test_special_tokens_written_out_in_a_body_are_text():
    tokenizer = toy_tokenizer(chat_template=True)
    item, _ = tokenize(questions(a="One <|end|> two </s> three.\n#### 72"), tokenizer)
    ids = item["rationales"][0]["completion_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1 and 2 not in ids
    assert tokenizer.decode(ids[: item["rationales"][0]["body_length"]]) == "One <|end|> two </s> three."


def test_slow_tokenizer_finds_the_same_characters():
    tokenizer = ByT5Tokenizer()  # bytes: no files needed
    text = "Ça: so 72 数."
    [(ids, offsets)] = encode(tokenizer, [text])
    assert len(ids) == len(text.encode())
    covered = [text[begin:end] for begin, end in offsets]
    assert covered == [character for character in text for _ in character.encode()]
    item, _ = tokenize(questions(), tokenizer)
    rationale = item["rationales"][0]
    span = rationale["completion_ids"][rationale["answer_start"] :][: rationale["answer_length"]]
    assert tokenizer.decode(span) == "72"
    assert words_at(tokenizer, rationale["completion_ids"], rationale["thinking"]) == ["S", "H", "T"]


def test_order_of_teachers_may_be_given():
    items, report = tokenize_questions(questions(), toy_tokenizer(), DataConfig(), teachers=["z", "b", "a"])
    assert [r["teacher"] for r in items[0]["rationales"]] == [2, 1] and report.teachers == ["z", "b", "a"]


def test_cache_is_used_only_for_the_same_data_tokenizer_and_options(tmp_path):
    def files(dataset, tokenizer, **options):
        tokenize_questions(dataset, tokenizer, DataConfig(**options), cache_dir=tmp_path)
        return len(list(tmp_path.glob("tokens-*.arrow")))

    assert files(questions(), toy_tokenizer()) == 1
    assert files(questions(), toy_tokenizer()) == 1
    assert files(questions(), toy_tokenizer(), max_length=100) == 2
    assert files(questions(), toy_tokenizer(True)) == 3
    assert files(questions(prompt="Else?"), toy_tokenizer()) == 4


def test_options_out_of_range_are_named():
    for options, part in [
        ({"suffix": "The answer"}, "data.suffix"),
        ({"prompt_template": "Q"}, "data.prompt_template"),
        ({"overlong": "trim"}, "data.overlong: 'trim' is not one of cut, drop"),
        ({"suffix_answer": "mine"}, "data.suffix_answer"),
        ({"wrong_answers": "mend"}, "data.wrong_answers"),
        ({"max_length": 2}, "data.max_length"),
    ]:
        with pytest.raises(UserError, match=re.escape(part)):
            tokenize(questions(), **options)
    tokenizer = toy_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="end-of-sequence"):
        tokenize(questions(), tokenizer)
