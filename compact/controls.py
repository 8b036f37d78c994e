"""Controls of adaptability (method §2): what the metric reads is spoiled, and everything else stays as it is."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from compact.errors import UserError


def controlled(dataset: Dataset, control: str) -> Dataset:
    """Tokenized questions under ``adaptability.control``.

    * ``shuffled_mask``: as many thinking tokens as before, at random places of each rationale's body.
    * ``wrong_answer``: the evidence (eq. 2) is asked for the answer of the next question that has another one. What
      is trained on, and the answer spans, do not change.

    Raises:
        UserError: all questions have the same answer.
    """
    if control == "none":
        return dataset
    if control == "shuffled_mask":
        return dataset.map(_shuffled)
    answers = dataset["evidence_ids"]
    others: list[list[int]] = []
    for index, own in enumerate(answers):
        rest = (answers[(index + ahead) % len(answers)] for ahead in range(1, len(answers)))
        wrong = next((other for other in rest if other != own), None)
        if wrong is None:
            raise UserError("adaptability.control: all questions have the same answer, so there is no wrong one")
        others.append(wrong)
    return dataset.map(lambda item, index: {"evidence_ids": others[index]}, with_indices=True)


def _shuffled(item: dict[str, Any]) -> dict[str, Any]:
    rationales = []
    for rationale in item["rationales"]:
        length = rationale["body_length"]
        body = list(rationale["thinking"][:length])
        random.Random(f"{item['id']} {rationale['teacher']}").shuffle(body)
        rationales.append({**rationale, "thinking": [*body, *rationale["thinking"][length:]]})
    return {"rationales": rationales}
