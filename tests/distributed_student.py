"""What tests/test_student.py runs on two gloo processes: ``python -m tests.distributed_student`` under torchrun.

Each process trains on a question of its own; the gradients must be the mean of the two questions' gradients, as one
process computes them. Prints one line a check that passed.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from compact.config import LoraConfig
from compact.student import StudentOutput, add_lora, head, merged, prepare
from compact_kernels.ragged import Ragged
from tests.architectures import tiny, token_ids
from tests.processes import leave

LENGTHS = ((9, 2, 6), (12, 5))


def forward(model: nn.Module, rank: int) -> StudentOutput:
    lengths = LENGTHS[rank]
    ragged = Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
    )
    return model(input_ids=torch.cat(token_ids(*lengths), dim=1), compact=ragged)


def step(model: nn.Module, rank: int) -> None:
    output = forward(model, rank)
    loss = output.head(output.hidden).log_softmax(-1)[:, 7 + rank].sum()
    if torch.is_grad_enabled():
        loss.backward()
    assert output.query is not None and bool(output.query.isfinite().all())


def shard(model: nn.Module, units: bool, **options: Any) -> None:
    """FSDP2 over every layer and the rest; with `units` as accelerate has it, embedding, norm and head apart."""
    backbone = model.base_model
    llama = hasattr(backbone, "norm")
    layers, norm, embedding = (
        (backbone.layers, backbone.norm, backbone.embed_tokens) if llama else (backbone.h, backbone.ln_f, backbone.wte)
    )
    for layer in layers:
        fully_shard(layer, **options)
    if units:
        tied = embedding.weight is model.lm_head.weight
        if not tied:
            fully_shard(embedding, **options)
        tail = [norm, embedding, model.lm_head] if tied else [norm, model.lm_head]
        fully_shard(tail, **{**options, "reshard_after_forward": False})
    fully_shard(model, **options)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def expected(model: nn.Module) -> dict[str, Tensor]:
    for rank in range(2):
        step(model, rank)
    return {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}


def compare(what: str, model: nn.Module, truth: dict[str, Tensor]) -> None:
    found = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == truth.keys(), found.keys() ^ truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    if dist.get_rank() == 0:
        print("passed:", what, flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))

    lora = add_lora(prepare(tiny("llama")), LoraConfig(rank=2, dropout=0.0))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            nn.init.constant_(parameter, 0.05)
    truth = expected(copy.deepcopy(lora))
    ddp = DistributedDataParallel(lora)
    step(ddp, rank)
    compare("lora under ddp", ddp, truth)

    for name in ("llama", "gpt2"):  # untied and tied
        truth = expected(prepare(tiny(name)))
        ddp = DistributedDataParallel(prepare(tiny(name)), find_unused_parameters=True)
        step(ddp, rank)
        compare(f"{name} under ddp", ddp, truth)

    for name, units, reshard in itertools.product(("llama", "gpt2"), (False, True), (False, True)):
        truth = expected(prepare(tiny(name)))
        model = prepare(tiny(name))
        shard(model, units, mesh=mesh, reshard_after_forward=reshard)
        heads: list[nn.Module] = []
        model.lm_head.register_forward_hook(lambda module, *_, ran=heads: ran.append(module))
        for _ in range(2):  # the second after a forward that no backward followed
            model.zero_grad()  # before it, as FSDP2 zeroes whole parameters while they are whole
            with torch.no_grad():
                step(model, rank)
            step(model, rank)
        assert len(heads) == 4 * units  # else torch before 2.13 does not end the forward of the head's unit
        compare(f"{name} under fsdp2, head in a unit: {units}, resharded: {reshard}", model, truth)
        plain = merged(model)
        torch.testing.assert_close(plain.state_dict(), tiny(name).state_dict())

    model = prepare(tiny("llama"))
    half = MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16, output_dtype=torch.bfloat16)  # accelerate's
    shard(model, True, mesh=mesh, mp_policy=half)
    output = forward(model, rank)
    assert output.hidden.dtype is torch.bfloat16
    for tensor in (output.query, output.key, output.pooled, output.eos_hidden):
        assert tensor is not None and tensor.dtype is torch.float32
    if rank == 0:
        print("passed: fsdp2 in bfloat16", flush=True)

    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    (head(model).weight * (rank + 1)).sum().backward()
    torch.testing.assert_close(whole(model.lm_head.weight.grad), torch.full((61, 32), 1.5))
    if rank == 0:
        print("passed: sharded head", flush=True)
    leave()


if __name__ == "__main__":
    main()
