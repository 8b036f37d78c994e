"""What tests/test_student.py runs on two gloo processes: ``python -m tests.distributed_student`` under torchrun.

Each process trains on a question of its own; the gradients must be the mean of the two questions' gradients, as one
process computes them. Prints one line a check that passed.
"""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from compact.config import LoraConfig
from compact.student import add_lora, head, merged, prepare
from compact_kernels.ragged import Ragged
from tests.architectures import tiny, token_ids

LENGTHS = ((9, 2, 6), (12, 5))


def step(model: nn.Module, rank: int) -> None:
    lengths = LENGTHS[rank]
    ragged = Ragged.build(
        sequence_lengths=lengths, prompt_lengths=[1] * len(lengths), rationales_per_question=[len(lengths)]
    )
    output = model(input_ids=torch.cat(token_ids(*lengths), dim=1), compact=ragged)
    output.head(output.hidden).log_softmax(-1)[:, 7 + rank].sum().backward()
    assert output.query is not None and bool(output.query.isfinite().all())


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
        torch.testing.assert_close(found[name], truth[name], rtol=1e-4, atol=1e-5)
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

    for name, unit, reshard in (("llama", False, True), ("llama", True, False), ("gpt2", False, True)):
        truth = expected(prepare(tiny(name)))
        model = prepare(tiny(name))
        for layer in model.base_model.layers if name == "llama" else model.base_model.h:
            fully_shard(layer, mesh=mesh)
        if unit:  # as accelerate has it
            fully_shard([model.base_model.norm, model.lm_head], mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        step(model, rank)
        compare(f"{name} under fsdp2, head in a unit: {unit}", model, truth)
        plain = merged(model)
        torch.testing.assert_close(plain.state_dict(), tiny(name).state_dict())

    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]))
    (head(model).weight * (rank + 1)).sum().backward()
    torch.testing.assert_close(whole(model.lm_head.weight.grad), torch.full((61, 32), 1.5))
    if rank == 0:
        print("passed: sharded head", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
