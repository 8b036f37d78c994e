"""The native library's loading and its build: what is refused or left out, in one sentence."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import warnings

import pytest
import torch

from compact_kernels import native
from tests.native_cases import NEEDS_LIBRARY, ROOT, python


def test_without_a_library_the_reason_is_the_builds_own(tmp_path):
    (tmp_path / "_native.json").write_text(json.dumps({"not_built": "there is no C++ compiler"}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # its absence is not worth one
        assert native.load(tmp_path) == native.Library(
            False, "there is no C++ compiler", record={"not_built": "there is no C++ compiler"}
        )
        assert "not built" in native.load(tmp_path / "nowhere").reason


def test_a_library_that_torch_cannot_load_is_left_aside_with_one_sentence(tmp_path):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    (tmp_path / "_native.json").write_text(json.dumps({"torch": "2.99.0"}))
    with pytest.warns(UserWarning, match=r"left aside: it was built with torch 2\.99\.0.*install this package again"):
        library = native.load(tmp_path)
    assert not library.loaded and "\n" not in library.reason


@pytest.mark.parametrize("note", ["[]", "null", "not JSON", None])
def test_a_library_without_a_record_is_not_opened(tmp_path, note):
    (tmp_path / "_native.so").write_bytes(b"not a library")
    if note is not None:
        (tmp_path / "_native.json").write_text(note)
    with pytest.warns(UserWarning, match="left aside: .*_native.json, which says what it was built from"):
        assert not native.load(tmp_path).loaded


@NEEDS_LIBRARY
def test_a_library_that_is_cut_short_is_not_opened(tmp_path):
    whole = (native.FOLDER / "_native.so").read_bytes()
    shutil.copy(native.FOLDER / "_native.json", tmp_path)
    for size in (1000, len(whole) // 2, len(whole) - 1):
        (tmp_path / "_native.so").write_bytes(whole[:size])
        with pytest.warns(UserWarning, match="_native.so is cut short"):  # opening it would be the end of this process
            assert not native.load(tmp_path).loaded


@NEEDS_LIBRARY
def test_a_library_that_asks_for_another_torchs_function_is_told_by_its_name(tmp_path):
    whole = (native.FOLDER / "_native.so").read_bytes()
    (tmp_path / "_native.so").write_bytes(whole.replace(b"\0torch_parallel_for\0", b"\0torch_parallel_fox\0"))
    shutil.copy(native.FOLDER / "_native.json", tmp_path)
    with pytest.warns(UserWarning, match="undefined symbol: torch_parallel_fox"):
        assert not native.load(tmp_path).loaded


def test_another_packages_csrc_is_not_taken_for_the_sources(tmp_path):
    folder = tmp_path / "compact_kernels"
    folder.mkdir()
    (tmp_path / "csrc").mkdir()
    (folder / "_native.so").write_bytes(b"not a library")
    (folder / "_native.json").write_text(json.dumps({"sources": "0" * 64}))
    with pytest.warns(UserWarning, match="cannot load it"):
        native.load(folder)


def test_a_library_of_other_sources_or_an_older_torch_is_not_opened(tmp_path, monkeypatch):
    folder = tmp_path / "compact_kernels"
    folder.mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "registration.cpp").write_text("// changed")
    (folder / "_native.so").write_bytes(b"not a library")
    (folder / "_native.json").write_text(json.dumps({"sources": "0" * 64}))
    with pytest.warns(UserWarning, match="csrc has changed since it was built"):
        assert not native.load(folder).loaded
    monkeypatch.setattr(torch, "__version__", "2.10.1")
    with pytest.warns(UserWarning, match=r"needs torch 2\.11 or newer, this is 2\.10\.1"):
        assert not native.load(folder).loaded


def test_the_switch_turns_it_off_and_the_ops_still_work():
    code = """
import torch
from compact_kernels import linear_logprob, native
from compact_kernels.head import backend, torch_rows
assert not native.LIBRARY.loaded and "COMPACT_KERNELS_NATIVE" in native.LIBRARY.reason
assert backend.backend_for(torch.zeros(1)) is torch_rows
print(linear_logprob(torch.ones(2, 3), torch.eye(3), torch.tensor([0, 1]))[0].tolist())
"""
    result = python(code, COMPACT_KERNELS_NATIVE="0", TRITON_INTERPRET="0")
    assert result.returncode == 0 and "-1.09" in result.stdout, result.stderr


def test_info_says_what_is_there_and_which_way_each_op_takes():
    result = subprocess.run([sys.executable, "-m", "compact_kernels.info"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    for word in ("torch:", "native library:", "cpu float32:", "divergence:", str(torch.__version__)):
        assert word in result.stdout
    assert (native.LIBRARY.reason or "_native.so") in result.stdout


# ---- the build ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "targets"),
    [
        (None, ["compute_80,code=sm_80", "compute_90,code=[sm_90,compute_90]"]),  # 100 is not known to this nvcc
        ("9.0;8.0", ["compute_80,code=sm_80", "compute_90,code=[sm_90,compute_90]"]),  # PTX of the highest
        ("90a", ["compute_90a,code=[sm_90a,compute_90a]"]),
        ("80 77", "knows no architecture 77; it knows 80 90"),
        ("", "COMPACT_KERNELS_CUDA_ARCHS is empty"),
    ],
)
def test_the_cuda_part_is_built_for_the_architectures_asked_for(tmp_path, asked, targets):
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/said\necho compute_80\necho compute_90\n")
    nvcc.chmod(0o755)
    code = f"""
import runpy, setuptools, sys
from pathlib import Path
setuptools.setup = lambda **_: None
module = runpy.run_path({str(ROOT / "setup.py")!r})
try:
    module["build_cuda"]([], ["ccache", "g++", "-isystem", "/opt"], Path({str(tmp_path)!r}))
except module["NotBuilt"] as error:
    print(error)
"""
    variables = {"CUDA_HOME": str(tmp_path)} | ({} if asked is None else {"COMPACT_KERNELS_CUDA_ARCHS": asked})
    result = python(code, **variables)
    if "No module named 'setuptools'" in result.stderr:
        pytest.skip("setuptools is not installed here")
    if isinstance(targets, str):
        assert targets in result.stdout, result.stderr
        return
    commands = (tmp_path / "said").read_text().splitlines()[1:]
    assert commands, result.stderr
    for command in commands:
        assert [word.split("=", 2)[2] for word in command.split() if "gencode" in word] == targets
        assert "-ccbin g++ " in command


def test_the_build_and_the_loader_agree_on_what_the_sources_are():
    code = f"""
import runpy, setuptools
setuptools.setup = lambda **_: None
print(runpy.run_path({str(ROOT / "setup.py")!r})["source_digest"]())
"""
    result = python(code)
    if "No module named 'setuptools'" in result.stderr:
        pytest.skip("setuptools is not installed here")
    assert result.stdout.strip() == native.source_digest(ROOT / "csrc"), result.stderr


def test_a_build_that_cannot_be_says_why_and_is_no_failure(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "compact_kernels").mkdir()
    (tmp_path / "compact_kernels" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", "lib"]
    for variables, reason in (
        ({"COMPACT_KERNELS_NATIVE": "0"}, "COMPACT_KERNELS_NATIVE was 0"),
        ({"CXX": "/nowhere/c++"}, "/nowhere/c++ cannot be run"),
    ):
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, **variables})
        if "No module named 'setuptools'" in result.stderr:
            pytest.skip("setuptools is not installed here")
        assert result.returncode == 0, result.stderr
        built = tmp_path / "lib" / "compact_kernels"
        assert reason in json.loads((built / "_native.json").read_text())["not_built"]
        assert not (built / "_native.so").exists()


def test_an_nvcc_that_cannot_be_run_costs_no_more_than_the_cuda_part(tmp_path, monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    setup = runpy.run_path(str(ROOT / "setup.py"))
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/nonexistent\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(setup["NotBuilt"], match="nvcc cannot be run"):
        setup["build_cuda"]([], ["c++"], tmp_path)
    nvcc.write_text("#!/bin/sh\necho 'nvcc fatal: no' >&2; exit 1\n")
    with pytest.raises(setup["NotBuilt"], match="nvcc failed: nvcc fatal: no"):
        setup["build_cuda"]([], ["c++"], tmp_path)
