"""Questions in a student's tokens: prompt, body, common suffix, answer spans, thinking tokens (method §1)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from compact.config import DataConfig
from compact.data_report import DataReport
from compact.errors import UserError
from compact.files import digest, write_atomically
from compact.sources import cache_folder, dataset_digest, write_arrow

_FORMAT = 1  # raise it when the columns or their meaning change, so that no old cache is read

TOKENS = pa.schema(
    [
        ("id", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("answer", pa.string()),
        ("kind", pa.string()),
        ("evidence_ids", pa.list_(pa.int32())),  # the gold answer, as tokenised inside the suffix
        (
            "rationales",
            pa.list_(
                pa.struct(
                    [
                        ("teacher", pa.int32()),  # index into report.teachers
                        ("completion_ids", pa.list_(pa.int32())),  # body, suffix, EOS
                        ("body_length", pa.int32()),  # B_k
                        ("answer_start", pa.int32()),  # in the completion
                        ("answer_length", pa.int32()),
                        ("thinking", pa.list_(pa.bool_())),  # one flag a completion token, False in the suffix
                        ("wrong", pa.bool_()),
                        ("cut", pa.bool_()),
                    ]
                )
            ),
        ),
    ]
)


def tokenize_questions(
    dataset: datasets.Dataset,
    tokenizer: Any,
    config: DataConfig,
    *,
    teachers: list[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[datasets.Dataset, DataReport]:
    """Turn the questions of :func:`compact.data.load_questions` into token ids, memory-mapped, one item a question.

    A completion is the body's tokens, then the suffix's, then EOS. Body and suffix are tokenised apart, so the suffix
    of a question has the same ids in every rationale. Special tokens written out in a body are taken as plain text.
    Without a chat template a space goes between a prompt that ends in no white space and the body.

    Args:
        tokenizer: of transformers; with a chat template, prompts go through it with a generation prompt.
        config: suffix, suffix_answer, wrong_answers, overlong, max_length, thinking_words, prompt_template.
        teachers: the order of the teachers; default: that of first appearance in `dataset`.
        cache_dir: where the Arrow file goes, named by everything it depends on; default: a folder that is removed
            when the process ends.

    Raises:
        UserError: an option out of range, no EOS, or no question left (the reasons are in the message).
    """
    _check(config, tokenizer)
    folder = cache_folder(cache_dir)
    teachers = _teachers(dataset) if teachers is None else list(teachers)
    options = [getattr(config, name) for name in _OPTIONS]
    parts = [_FORMAT, dataset_digest(dataset), _tokenizer_digest(tokenizer), teachers, options]
    key = digest(parts)
    target, report_file = folder / f"tokens-{key}.arrow", folder / f"tokens-{key}.json"
    if not (target.exists() and report_file.exists()):
        report = DataReport(teachers=teachers)
        write_arrow(target, TOKENS, _Tokenizing(tokenizer, config, report).batches(dataset))
        write_atomically(report_file, json.dumps(report.to_dict()))
    report = DataReport(**json.loads(report_file.read_text()))
    if not report.questions["used"]:
        raise UserError(
            f"no question is left to train on. {report.summary()}\n"
            f"Raise data.max_length (now {config.max_length} tokens of prompt and completion), shorten data.suffix or "
            "data.prompt_template, or set data.overlong: cut, data.wrong_answers: keep"
        )
    return datasets.Dataset.from_file(str(target)), report


_OPTIONS = (
    "prompt_template",
    "suffix",
    "suffix_answer",
    "wrong_answers",
    "overlong",
    "max_length",
    "thinking_words",
)


def _check(config: DataConfig, tokenizer: Any) -> None:
    config.validate(_OPTIONS)
    if tokenizer.eos_token_id is None:
        raise UserError("the student's tokenizer has no end-of-sequence token; set eos_token in its configuration")


def _teachers(dataset: datasets.Dataset) -> list[str]:
    names: dict[str, None] = {}
    for row in dataset.select_columns(["rationales"]):
        names.update(dict.fromkeys(rationale["teacher"] for rationale in row["rationales"]))
    return list(names)


def _tokenizer_digest(tokenizer: Any) -> str:
    model = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    parts = [type(tokenizer).__name__, model, tokenizer.chat_template, tokenizer.eos_token_id, tokenizer.bos_token_id]
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=16).hexdigest()


def render_prompt(tokenizer: Any, prompt: str | list[dict[str, str]], template: str) -> str | None:
    """The prompt as text for a tokenizer without a chat template; None where there is one.

    A single message of the user is its text; a conversation is written out, "System: …", "User: …".
    """
    if tokenizer.chat_template:
        return None
    if not isinstance(prompt, str):
        prompt = (
            prompt[0]["content"]
            if len(prompt) == 1
            else "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)
        )
    return template.replace("{prompt}", prompt)


def prompt_ids(tokenizer: Any, prompt: str | list[dict[str, str]], template: str) -> list[int]:
    """Token ids of a prompt, up to where the student speaks: chat template, or `template` after BOS if one is due."""
    text = render_prompt(tokenizer, prompt, template)
    if text is None:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if tokenizer.bos_token_id is not None and list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id]:
        ids.insert(0, tokenizer.bos_token_id)
    return ids


def encode(tokenizer: Any, texts: list[str]) -> list[tuple[list[int], np.ndarray]]:
    """Ids of plain texts and the characters [begin, end) each token covers, (n, 2) int64.

    A token inside a character (bytes) covers the whole character; a token of no character covers an empty range.

    Raises:
        UserError: a slow tokenizer whose tokens cannot be laid over the text.
    """
    if not texts:
        return []
    if not tokenizer.is_fast:
        return [_encode_slowly(tokenizer, text) for text in texts]
    coded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return [
        (ids, np.array(offsets, dtype=np.int64).reshape(-1, 2))
        for ids, offsets in zip(coded["input_ids"], coded["offset_mapping"])
    ]


def _encode_slowly(tokenizer: Any, text: str) -> tuple[list[int], np.ndarray]:
    """The same from what growing prefixes of the ids decode to; quadratic, and exact or refused."""
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ends, lead = [], 0
    for count in range(1, len(ids) + 1):
        decoded = tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False)
        if count == 1 and decoded.startswith(" ") and not text.startswith(" "):
            lead = 1  # the tokenizer's own space before a text
        decoded = decoded[lead:]
        whole = decoded if decoded == text else decoded.rstrip("\ufffd")  # which stands for a character not yet whole
        if not text.startswith(whole):
            raise UserError(
                f"the slow tokenizer {type(tokenizer).__name__} does not give back the text that it was given "
                f"({decoded[-20:]!r} at token {count}), so answers cannot be found in it; use its fast version"
            )
        ends.append(len(whole))
    if ids and ends[-1] < len(text):
        raise UserError(
            f"the slow tokenizer {type(tokenizer).__name__} loses the end of {text[-20:]!r}; use its fast version"
        )
    begins = [0, *ends[:-1]]
    for i in reversed(range(len(ends) - 1)):  # bytes before the one that completes a character
        if begins[i] == ends[i]:
            begins[i], ends[i] = begins[i + 1], ends[i + 1]
    return ids, np.array([begins, ends], dtype=np.int64).T.reshape(-1, 2)


def lead_of(rendered: str | None) -> str:
    """What stands before a rationale's body: a space, unless the prompt, if it is known as text, ends in one."""
    return " " if rendered is not None and not rendered[-1:].isspace() else ""


def suffix_ids(tokenizer: Any, suffix: str, answer: str) -> tuple[list[int], int, int]:
    """Ids of a suffix template with this answer and EOS, and where the answer stands: first token, number of tokens.

    Raises:
        UserError: the tokenizer leaves nothing of the answer.
    """
    before, after = suffix.split("{answer}")
    [(ids, offsets)] = encode(tokenizer, [before + answer + after])
    start, length = _covering(offsets, len(before), len(before) + len(answer))
    if not length:
        raise UserError(
            f"data.suffix: the answer {answer!r} leaves no token in {before + answer + after!r}; "
            "the student's tokenizer drops it"
        )
    return [*ids, tokenizer.eos_token_id], start, length


def _covering(offsets: np.ndarray, begin: int, end: int) -> tuple[int, int]:
    """First token and number of tokens that overlap the characters [begin, end)."""
    inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin) & (offsets[:, 0] < offsets[:, 1]))
    return (int(inside[0]), int(inside[-1] - inside[0] + 1)) if inside.size else (0, 0)


class _Tokenizing:
    def __init__(self, tokenizer: Any, config: DataConfig, report: DataReport):
        self.tokenizer, self.config, self.report = tokenizer, config, report
        self.teacher_index = {name: index for index, name in enumerate(report.teachers)}
        words = sorted(filter(None, map(str.strip, config.thinking_words)), key=len, reverse=True)
        either = "|".join(map(re.escape, words))
        self.thinking = re.compile(rf"(?<!\w)(?:{either})(?!\w)", re.IGNORECASE) if words else re.compile(r"(?!)")
        self.suffixes: dict[str, tuple[list[int], int, int]] = {}  # few different answers: cheap, and cleared

    def batches(self, dataset: datasets.Dataset, size: int = 128) -> Iterator[pa.RecordBatch]:
        with tqdm(total=len(dataset), desc="Tokenizing questions", unit=" questions", disable=None) as progress:
            for start in range(0, len(dataset), size):
                rows = dataset.select(range(start, min(start + size, len(dataset)))).to_list()
                items = self._items(rows)
                progress.update(len(rows))
                if items:
                    yield pa.RecordBatch.from_pylist(items, schema=TOKENS)

    def _items(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        prompts, texts = [], []
        for row in rows:
            prompt = json.loads(row["prompt"]) if row["is_messages"] else row["prompt"]
            rendered = render_prompt(self.tokenizer, prompt, self.config.prompt_template)
            try:
                prompts.append(prompt_ids(self.tokenizer, prompt, self.config.prompt_template))
            except Exception as error:  # whatever a template's code raises
                raise UserError(
                    f"question {row['id']!r}: the tokenizer's chat template refuses its prompt ({error}); change its "
                    "roles, or give the prompt as text"
                ) from error
            lead = lead_of(rendered)
            texts += [lead + body if (body := r["body"].rstrip()) else "" for r in row["rationales"]]
        bodies = iter(encode(self.tokenizer, texts))
        texts_left = iter(texts)
        items = []
        for row, prompt_tokens in zip(rows, prompts):
            coded = [(*next(bodies), next(texts_left)) for _ in row["rationales"]]
            item = self._item(row, prompt_tokens, coded)
            if item is not None:
                items.append(item)
        return items

    def _item(
        self, row: dict[str, Any], prompt: list[int], bodies: list[tuple[list[int], np.ndarray, str]]
    ) -> dict[str, Any] | None:
        config, report, name = self.config, self.report, f"question {row['id']!r}"
        report.questions["read"] += 1
        report.rationales["read"] += len(bodies)
        report.rationales["wrong"] += sum(rationale["wrong"] for rationale in row["rationales"])
        report.rationales["unrecognised_closings"] += sum(not r["recognised"] for r in row["rationales"])
        report.questions["all_wrong"] += bool(bodies) and all(r["wrong"] for r in row["rationales"])
        if not prompt:
            report.refuse_question(name, "its prompt leaves no token:", f"{row['prompt']!r}", rationales=len(bodies))
            return None
        gold, start, length = self._suffix(row["answer"])
        evidence = gold[start : start + length]
        if len(prompt) + len(gold) > config.max_length:
            report.refuse_question(
                name,
                "prompt and suffix alone are longer than data.max_length:",
                f"{len(prompt)} + {len(gold)} > {config.max_length} tokens",
                rationales=len(bodies),
            )
            return None
        rationales = []
        for rationale, (body, offsets, text) in zip(row["rationales"], bodies):
            place = f"{name}, teacher {rationale['teacher']!r}"
            if rationale["teacher"] not in self.teacher_index:
                report.refuse_rationale(place, "a teacher that the training questions do not have")
                continue
            if rationale["wrong"] and config.wrong_answers == "drop":
                report.refuse_rationale(place, "wrong answer (data.wrong_answers: drop)", f"{rationale['answer']!r}")
                continue
            if self.tokenizer.eos_token_id in body:  # some tokenizers know no other reading of it
                reason = "its text is read as the end of a sequence:"
                report.refuse_rationale(place, reason, f"{self.tokenizer.eos_token!r}")
                continue
            answer = row["answer"]
            if config.suffix_answer == "own" and rationale["wrong"]:
                answer = rationale["answer"]
            suffix, start, length = self._suffix(answer)
            room = config.max_length - len(prompt) - len(suffix)
            cut = len(body) > room
            if cut and (config.overlong == "drop" or room <= 0):
                reason = "too long (data.overlong: drop):" if room > 0 else "too long, and no room for a body:"
                total = len(prompt) + len(body) + len(suffix)
                report.refuse_rationale(place, reason, f"{total} > {config.max_length} tokens")
                continue
            thinking = self._thinking_flags(text, offsets)
            body_length = min(len(body), room)
            while cut and body_length and offsets[body_length, 0] < offsets[body_length - 1, 1]:
                body_length -= 1  # no character is cut in two
            report.rationales["cut"] += cut
            rationales.append(
                {
                    "teacher": self.teacher_index[rationale["teacher"]],
                    "completion_ids": body[:body_length] + suffix,
                    "body_length": body_length,
                    "answer_start": body_length + start,
                    "answer_length": length,
                    "thinking": thinking[:body_length].tolist() + [False] * len(suffix),
                    "wrong": rationale["wrong"],
                    "cut": cut,
                }
            )
        if not rationales:
            report.questions["refused"] += 1
            report.because(name, "no rationale left")
            return None
        report.questions["used"] += 1
        report.rationales["used"] += len(rationales)
        return {
            "id": row["id"],
            "prompt_ids": prompt,
            "answer": row["answer"],
            "kind": row["kind"],
            "evidence_ids": evidence,
            "rationales": rationales,
        }

    def _suffix(self, answer: str) -> tuple[list[int], int, int]:
        if answer not in self.suffixes:
            if len(self.suffixes) > 10_000:
                self.suffixes.clear()
            self.suffixes[answer] = suffix_ids(self.tokenizer, self.config.suffix, answer)
        return self.suffixes[answer]

    def _thinking_flags(self, text: str, offsets: np.ndarray) -> np.ndarray:
        """(n,) bool: the first sub-token of every thinking word of a body, found by characters."""
        flags = np.zeros(len(offsets), dtype=bool)
        begins = np.array([match.start() for match in self.thinking.finditer(text)], dtype=np.int64)
        if begins.size and len(offsets):
            # The first token that ends beyond the word's first character holds it.
            first = np.searchsorted(np.maximum.accumulate(offsets[:, 1]), begins, side="right")
            flags[first[first < len(flags)]] = True
        return flags
