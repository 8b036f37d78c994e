"""What is measured: heads, batches and students, at full size for a GPU and at toy size for a CPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch

ATTENTION = "attention"  # the work of bench.attention, whose records name a layer and a batch as their head


@dataclass(frozen=True)
class Shape:
    """One lm head."""

    vocabulary: int  # V
    width: int  # D

    @property
    def label(self) -> str:
        return f"{self.vocabulary}x{self.width}"


@dataclass(frozen=True)
class Student:
    """A Qwen2.5-shaped decoder with tied embeddings."""

    head: Shape
    layers: int
    attention_heads: int
    key_value_heads: int
    intermediate: int


@dataclass(frozen=True)
class Scale:
    """All sizes of a run."""

    heads: tuple[Shape, ...]
    questions: int
    rationales: int  # K
    tokens: int  # scored rows of each rationale where nothing is masked
    long_questions: int
    long_tokens: int
    students: dict[str, Student]
    dtype: torch.dtype
    copy_mib: int  # size of the buffer whose copy measures the memory's bandwidth
    compile_backend: str


FULL = Scale(
    heads=(Shape(49152, 576), Shape(151936, 896), Shape(128256, 2048), Shape(152064, 3584), Shape(256000, 2304)),
    questions=8,
    rationales=4,
    tokens=256,
    long_questions=2,
    long_tokens=4096,
    students={
        "0.5b": Student(Shape(151936, 896), 24, 14, 2, 4864),
        "1.5b": Student(Shape(151936, 1536), 28, 12, 2, 8960),
    },
    dtype=torch.bfloat16,
    copy_mib=1024,
    compile_backend="inductor",
)
TINY = Scale(
    heads=(Shape(512, 64), Shape(1000, 48)),
    questions=2,
    rationales=4,
    tokens=32,
    long_questions=2,
    long_tokens=64,
    students={
        "0.5b": Student(Shape(512, 64), 2, 4, 2, 96),
        "1.5b": Student(Shape(512, 96), 2, 4, 2, 128),
    },
    dtype=torch.float32,
    copy_mib=1,
    compile_backend="eager",  # code generation for a CPU would take longer than everything else together
)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def scale() -> Scale:
    """Full size where there is a GPU."""
    return FULL if device().type == "cuda" else TINY
