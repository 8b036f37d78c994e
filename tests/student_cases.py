"""What the tests of the student share: packed sequences, a pass over them, gradients, a LoRA that is not zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compact.student import StudentOutput
from compact_kernels.ragged import Ragged
from tests.architectures import token_ids

LENGTHS = (9, 2, 6, 12)


def ragged(*lengths: int) -> Ragged:
    return Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
    )


def run(model: nn.Module, *lengths: int) -> StudentOutput:
    return model(input_ids=torch.cat(token_ids(*lengths), dim=1), compact=ragged(*lengths))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys() and one
    for name in one:
        scale = max(other[name].abs().max().item(), 1e-3)
        assert (one[name] - other[name]).abs().max().item() <= tolerance * scale, name


def directions(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def stir(model: nn.Module) -> None:
    """Give LoRA's second matrices, which start at zero, values."""
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_B" in name:
                parameter.copy_(0.1 * directions(*parameter.shape))
