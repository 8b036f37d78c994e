"""The student of every study here, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy_run import save_student, write_rows


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    save_student(folder / "student", max_position_embeddings=512)
    write_rows(folder / "held.jsonl", [{"question": "How many?", "explanation": "Two and two are four."}] * 3)
    return folder
