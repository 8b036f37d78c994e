"""Builds the native library; everything else is in pyproject.toml.

The library sees nothing of torch but its stable ABI's headers, and nothing of Python: one file serves every torch
from 2.11 on and every Python. Torch itself is not imported: its headers are looked for where the interpreter that
was started keeps its packages, also from within pip's isolated build. What cannot be built is left out, with the
reason beside the library, where `python -m compact_kernels.info` reads it.

    COMPACT_KERNELS_NATIVE=0     builds nothing (and, when running, uses nothing)
    COMPACT_KERNELS_CUDA_ARCHS   what the CUDA part is built for, default "80 90 100"; empty leaves it out
    CXX, CXXFLAGS, CUDA_HOME     as usual
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # before setuptools 70.1, which only a direct call of this file can meet
    bdist_wheel = None

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
DEFINES = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # of the oldest ABI that suffices: 2.10
COMPILE = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-fopenmp-simd", "-Wall", "-Wextra"]
COMPILE += ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
ARCHITECTURES = "80 90 100"


class NotBuilt(Exception):
    """Why the library, or its CUDA part, is not built."""


def source_digest() -> str:
    """Of everything that decides what the library is; compact_kernels.native asks for the same."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".cpp", ".cu", ".h"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def find_torch() -> tuple[Path, str]:
    """The folder of a torch with the stable ABI's headers, and its version."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    # The interpreter's own packages first: within an isolated build sys.path does not show them.
    places = [sysconfig.get_path(name, vars=vars) for vars in (None, base) for name in ("platlib", "purelib")]
    places += [site.getusersitepackages(), *site.getsitepackages(), *sys.path]
    found = []
    for place in dict.fromkeys(filter(None, places)):
        version = Path(place, "torch", "version.py")
        if version.is_file():
            text = re.search(r"""__version__ = ['"]([^'"]+)""", version.read_text())
            number = re.match(r"(\d+)\.(\d+)", text[1]) if text else None
            if number and (int(number[1]), int(number[2])) >= OLDEST_TORCH:
                return version.parent, text[1]
            found.append(f"{version.parent} is {text[1] if text else 'of no known version'}")
    if found:
        raise NotBuilt(f"torch 2.11 or newer is needed to build it: {'; '.join(found)}")
    raise NotBuilt(
        f"the build found no torch beside {sys.executable}: install torch first, then this package again "
        "(where the installer builds in another environment: pip install 'setuptools>=77', then with "
        "--no-build-isolation)"
    )


def run(command: list[str]) -> str:
    """What the command says; raises NotBuilt with the compiler's own words."""
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise NotBuilt(f"{command[0]} cannot be run: {error.strerror}") from None
    if result.returncode != 0:
        print(result.stdout + result.stderr, file=sys.stderr)
        said = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
        line = next((line for line in said if "error" in line), said[-1] if said else "no message")
        raise NotBuilt(f"{command[0]} failed: {line}")
    return result.stdout


def find_compiler() -> list[str]:
    """A C++ compiler that knows C++20."""
    asked = os.environ.get("CXX")
    candidates = (
        [shlex.split(asked)] if asked else [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    )
    if not candidates:
        raise NotBuilt("there is no C++ compiler (c++, g++, clang++; or set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cpp")
        probe.write_text("#include <bit>\nint main() { return std::bit_cast<int>(0.0f); }\n")
        for compiler in candidates:
            try:
                run([*compiler, "-std=c++20", "-c", str(probe), "-o", str(Path(folder, "probe.o"))])
                return compiler
            except NotBuilt as error:
                reason = str(error)
    raise NotBuilt(f"no C++20 compiler: {reason}")


def find_nvcc() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        path = shutil.which("nvcc", path=str(Path(home, "bin")))
    else:
        path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        raise NotBuilt(f"there is no nvcc in {home}/bin" if home else "there is no nvcc (set CUDA_HOME)")
    return path


def build_cuda(
    include: list[str], compiler: list[str], folder: Path
) -> tuple[list[str], list[str], dict[str, object]]:
    """Objects of the CUDA part, the command that links with them, and what they were built for."""
    asked = os.environ.get("COMPACT_KERNELS_CUDA_ARCHS")
    # As "80 90", or as torch has it: "8.0;9.0".
    wanted = re.split(r"[\s;,]+", (ARCHITECTURES if asked is None else asked).replace(".", "").strip())
    if not wanted[0]:
        raise NotBuilt("COMPACT_KERNELS_CUDA_ARCHS is empty")
    nvcc = find_nvcc()
    listed = re.findall(r"compute_(\d+)", run([nvcc, "--list-gpu-arch"]))
    number = {arch: arch.rstrip("af") for arch in wanted}  # 90a is 90 with what no later one has
    architectures = sorted((arch for arch in wanted if number[arch] in listed), key=lambda arch: int(number[arch]))
    unknown = [arch for arch in wanted if arch not in architectures]
    if unknown if asked else not architectures:  # of our own list, what an older nvcc does not know is left out
        raise NotBuilt(f"{nvcc} knows no architecture {' '.join(unknown)}; it knows {' '.join(listed)}")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures[:-1]]
    last = architectures[-1]  # as PTX too, for what comes after it
    targets += [f"-gencode=arch=compute_{last},code=[sm_{last},compute_{last}]"]
    # Of "ccache g++ -flags" the compiler: the last word before the flags.
    host = [*itertools.takewhile(lambda word: not word.startswith("-"), compiler)][-1]
    objects = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        objects.append(str(folder / (source.stem + ".cu.o")))
        flags = ["-std=c++20", "-O3", "-lineinfo", "-ccbin", host, "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        run([nvcc, *flags, *targets, *DEFINES, *include, "-c", str(source), "-o", objects[-1]])
    link = [nvcc, "-shared", "-cudart", "static", "-ccbin", host]  # it knows where its runtime is
    return objects, link, {"cuda_archs": architectures}


class BuildNative(build_ext):
    """One shared library beside the package, whatever the Python; a failure is a note, not an error."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.build_lib, self.get_ext_filename(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, object] = {"sources": source_digest()}
        try:
            record |= self.build_library(target)
        except NotBuilt as error:
            target.unlink(missing_ok=True)
            record["not_built"] = str(error)
            print(f"compact_kernels: the native library is not built: {error}", file=sys.stderr)
        target.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")

    def build_library(self, target: Path) -> dict[str, object]:
        if os.environ.get("COMPACT_KERNELS_NATIVE") == "0":
            raise NotBuilt("COMPACT_KERNELS_NATIVE was 0 in the environment")
        if not sys.platform.startswith("linux"):
            raise NotBuilt(f"it is built on Linux, this is {sys.platform}")
        torch, version = find_torch()
        compiler = find_compiler()
        include = ["-isystem", str(torch / "include")]
        folder = Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        record: dict[str, object] = {"torch": version, "compiler": " ".join(compiler)}
        flags = [*COMPILE, *shlex.split(os.environ.get("CXXFLAGS", ""))]
        link, objects = [*compiler, "-shared"], []
        try:
            objects, link, built = build_cuda(include, compiler, folder)
            record |= built
            flags.append("-DCOMPACT_WITH_CUDA")
        except NotBuilt as error:
            record["no_cuda"] = str(error)
            print(f"compact_kernels: the native library has no CUDA part: {error}", file=sys.stderr)
        for source in [ROOT / "csrc" / "registration.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]:
            objects.append(str(folder / (source.stem + ".o")))
            run([*compiler, *flags, *DEFINES, *include, "-c", str(source), "-o", objects[-1]])
        # torch's libraries are found by name among those already loaded.
        libraries = [f"-L{torch / 'lib'}", "-Xlinker", "--no-as-needed", "-ltorch_cpu", "-ltorch"]
        sanitizers = [f"-Xcompiler={flag}" if "-cudart" in link else flag for flag in flags if "sanitize" in flag]
        partial = str(target) + ".part"
        run([*link, *sanitizers, *objects, *libraries, "-o", partial])
        os.replace(partial, target)
        return record

    def copy_extensions_to_source(self) -> None:
        for extension in self.extensions:
            library = Path(self.get_ext_filename(extension.name))
            for name in (library, library.with_suffix(".json")):
                built, place = self.build_lib / name, ROOT / name
                if built.exists():
                    shutil.copy(built, f"{place}.part")
                    os.replace(f"{place}.part", place)  # a running program keeps the file it has loaded
                else:
                    place.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        paths = [Path(self.build_lib, self.get_ext_filename(extension.name)) for extension in self.extensions]
        return [str(path) for library in paths for path in (library, library.with_suffix(".json")) if path.exists()]


commands: dict[str, type] = {"build_ext": BuildNative}
if bdist_wheel is not None:

    class NativeWheel(bdist_wheel):
        """Of this platform, if a library is in it; of any Python 3 in any case."""

        def get_tag(self) -> tuple[str, str, str]:
            platform = super().get_tag()[2]
            built = list(Path(self.bdist_dir or ".").rglob("_native.so"))
            return "py3", "none", platform if built else "any"

    commands["bdist_wheel"] = NativeWheel

setup(ext_modules=[Extension("compact_kernels._native", sources=[])], cmdclass=commands)
