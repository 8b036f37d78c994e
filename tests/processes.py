"""Processes that tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

ROOT = Path(__file__).parent.parent


def environment() -> dict[str, str]:
    """This process's, importing what it imports, but not in Triton's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return kept | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])}


def two_ranks(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """``python -m module`` in two gloo processes of one thread each, without GPUs: there may be fewer of these.

    As users' processes are, so not in Triton's interpreter.
    """
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            "-m",
            module,
            *arguments,
        ],
        cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=300,
        capture_output=True,
        text=True,
    )


def leave() -> NoReturn:
    """End this rank when the other has come as far: one that leaves while it is still talked to can hang the other.

    Not through the interpreter's end: a gloo thread that is still running then aborts the process.
    """
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)
