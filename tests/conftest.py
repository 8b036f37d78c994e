"""Before anything imports torch: one thread a worker, one GPU, no hub. Before Triton is imported: its interpreter."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # of several, one process would make DataParallel
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for the network fails
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from compact_kernels import dispatch  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1" and dispatch.TRITON_FOUND:
    import numpy as np
    import triton
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fused(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    # As on a GPU: before 3.9 the interpreter lets a NaN win in a maximum, and rounds a fused product twice.
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
        InterpreterBuilder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
        InterpreterBuilder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
        InterpreterBuilder.create_fma = fused

dispatch.INTERPRETED = False  # kernels run where a test asks for them; CPU tensors stay in torch elsewhere
pytest.register_assert_rewrite("tests.student_cases", "tests.train_cases")  # their asserts tell values too


@pytest.fixture
def triton_kernels(monkeypatch):
    """Triton's kernels run whatever the device: on a CPU in the interpreter, if it can be."""
    pytest.importorskip("triton", reason="needs Triton")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)


@pytest.fixture
def untouched_gpus(monkeypatch):
    """Two GPUs, it seems, whose random states nobody may read or set."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: pytest.fail("a GPU's random state is touched"))
