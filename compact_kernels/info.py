"""What is there, what is not and why, and which way each op takes: `python -m compact_kernels.info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch

from compact_kernels import native
from compact_kernels.dispatch import TRITON_FOUND, native_applies, native_cuda_applies, triton_applies
from compact_kernels.head.backend import backend_for

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NAMES = {"triton_rows": "Triton", "native_rows": "C++", "torch_rows": "plain torch"}


def versions() -> list[tuple[str, str]]:
    triton = importlib.metadata.version("triton") if TRITON_FOUND else "not installed"
    capability = torch.backends.cpu.get_cpu_capability()
    found = [
        ("Python", f"{sys.version.split()[0]}, {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("Triton", triton),
        ("CPU", f"{platform.machine()}, torch uses {capability}, {torch.get_num_threads()} threads"),
    ]
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        found.append((f"GPU {device}", f"{torch.cuda.get_device_name(device)}, sm_{major}{minor}"))
    return found if torch.cuda.is_available() else [*found, ("GPU", "none that torch can use")]


def library() -> list[tuple[str, str]]:
    """The native library's two parts."""
    known = native.LIBRARY
    switch = os.environ.get("COMPACT_KERNELS_NATIVE", "not set")
    if not known.loaded:
        return [("native library", f"not used: {known.reason}"), ("COMPACT_KERNELS_NATIVE", switch)]
    made = f"built with torch {known.record.get('torch')} and {known.record.get('compiler')}"
    instructions = torch.ops.compact_native.cpu_capability()
    found = [
        ("native library", f"{native.FOLDER / '_native.so'}, {made}"),
        ("CPU part", f"instructions: {instructions}"),
    ]
    if known.cuda:
        found.append(("CUDA part", f"built for {', '.join(known.record['cuda_archs'])} (the last one as PTX too)"))
        for device in range(torch.cuda.device_count()):
            found.append((f"CUDA part on GPU {device}", native.cuda_trouble(device) or "runs"))
    else:
        found.append(("CUDA part", f"not built: {known.record.get('no_cuda')}"))
    return [*found, ("COMPACT_KERNELS_NATIVE", switch)]


def ways() -> list[tuple[str, str]]:
    """Which way each op takes, a line a device and dtype."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for device in devices:
        for dtype in DTYPES:
            tensor = torch.empty(0, dtype=dtype, device=device)
            statistics = torch.empty(0, dtype=torch.promote_types(dtype, torch.float32), device=device)
            head = NAMES[backend_for(tensor).__name__.rpartition(".")[2]]
            launches = (
                "CUDA"
                if native_cuda_applies(statistics)
                else "Triton"
                if triton_applies(statistics)
                else "plain torch"
            )
            divergence = "Triton" if triton_applies(tensor) else "C++" if native_applies(statistics) else "plain torch"
            line = f"head: {head}; rule and consensus: {launches}; divergence: {divergence}"
            found.append((f"{device} {str(dtype)[6:]}", line))
    return found


def main() -> None:
    for rows in (versions(), library(), ways()):
        for name, text in rows:
            print(f"{name + ':':24} {text}")
        print()


if __name__ == "__main__":
    main()
