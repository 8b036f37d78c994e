"""Where ops run."""

from contextlib import contextmanager

import pytest
import torch

import compact_kernels
from compact_kernels import dispatch


class OnAGpu(torch.Tensor):
    is_cuda = True


def test_ops_run_with_the_gpu_of_their_first_tensor_as_the_current_one(monkeypatch):
    current = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    there, here = torch.ones(2).as_subclass(OnAGpu), torch.ones(2)
    seen = dispatch.on_its_device(lambda *args, **kwargs: list(current))
    assert seen(1, there) == seen(x=there) == [there] and seen(here) == seen() == []


@pytest.mark.parametrize(
    "op", ["answer_divergence", "compatibility_loss", "linear_logprob", "linear_token_stats", "question_consensus"]
)
def test_public_ops_do_so(op, monkeypatch):
    class Asked(Exception):
        pass

    def device_of(tensor):
        raise Asked

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with pytest.raises(Asked):
        getattr(compact_kernels, op)(torch.ones(2).as_subclass(OnAGpu))
