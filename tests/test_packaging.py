"""What pyproject.toml, bootstrap.py and the installed package promise."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for folder in ("compact", "compact_kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")
)


@pytest.fixture(scope="module")
def bootstrap():
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "bootstrap.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def imported_packages(path: Path) -> set[str]:
    """The top-level packages a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_kernels_import_nothing_but_torch_triton_and_python():
    for path in SOURCES:
        if path.is_relative_to(ROOT / "compact_kernels"):
            foreign = imported_packages(path) - sys.stdlib_module_names - {"torch", "triton", "compact_kernels"}
            assert not foreign, f"{path.relative_to(ROOT)} imports {sorted(foreign)}"


def test_bootstrap_needs_nothing_but_python():
    assert imported_packages(ROOT / "bootstrap.py") <= sys.stdlib_module_names


def test_python_3_10_can_parse_every_file():
    for path in [*SOURCES, ROOT / "bootstrap.py", ROOT / "setup.py"]:
        ast.parse(path.read_text(), filename=str(path), feature_version=(3, 10))


def test_a_wheel_holds_every_recipe_and_both_packages(tmp_path):
    source = tmp_path / "source"
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout: the folder may hold builds and runs that must not be copied")
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    built = subprocess.run(
        [
            sys.executable,
            "-c",
            "from setuptools import setup; setup()",
            "-q",
            "build",
            "--build-lib",
            str(tmp_path / "lib"),
        ],
        cwd=source,
        capture_output=True,
        text=True,
    )
    if "No module named 'setuptools'" in built.stderr:
        pytest.skip("setuptools is not installed here")
    assert built.returncode == 0 and "would be ignored" not in built.stderr, built.stderr
    expected = {
        name
        for name in tracked.stdout.splitlines()
        if (ROOT / name).is_file()
        and (name.startswith(("compact/recipes/", "compact/grids/")) or re.match(r"compact(_kernels)?/.*\.py$", name))
    }
    held = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    assert held == expected


def test_torch_is_asked_for_as_the_bootstrap_keeps_it(bootstrap):
    (line,) = re.findall(r'^ *"(torch\W.*)",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    torch = Requirement(line)
    assert str(torch.specifier) == ">=" + ".".join(map(str, bootstrap.TORCH_OLDEST))
    assert torch.specifier.contains(bootstrap.TORCH_PINNED)


def test_a_second_bootstrap_installs_nothing_and_no_install_may_move_torch(bootstrap, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "choose_environment", lambda: tmp_path / "bin" / "python")
    monkeypatch.setattr(bootstrap, "torch_in", lambda python: "2.12.1+cpu")
    monkeypatch.setattr(bootstrap, "call", lambda *command: calls.append([str(word) for word in command]))
    (tmp_path / "setup.py").touch()
    (tmp_path / "pyproject.toml").touch()

    bootstrap.set_up({"eval", "plot"})
    (install,) = calls
    constraint = install[install.index("--constraint") + 1]
    assert Path(constraint).read_text() == "torch==2.12.1+cpu\n"
    assert install[-1] == f"{tmp_path}[eval,plot]"
    bootstrap.set_up({"eval", "plot"})
    assert len(calls) == 1
    bootstrap.set_up({"dev"})  # the tests need more
    assert len(calls) == 2
    bootstrap.set_up({"eval", "plot"})  # which holds what training needs
    assert len(calls) == 2
    (tmp_path / "pyproject.toml").write_text("changed")
    bootstrap.set_up({"eval", "plot"})
    assert len(calls) == 3
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "cpu" / "rows.cpp").write_text("changed")  # the native library is built anew
    bootstrap.set_up({"eval", "plot"})
    assert len(calls) == 4
    (stamp,) = tmp_path.rglob("compact-setup.json")
    stamp.write_text("{")  # cut short
    bootstrap.set_up({"eval", "plot"})
    assert len(calls) == 5


def test_bootstrap_installs_the_pinned_torch_where_there_is_none(bootstrap, tmp_path, monkeypatch):
    calls = []
    found = iter([None, "2.13.0"])
    monkeypatch.setattr(bootstrap, "ROOT", tmp_path)
    monkeypatch.setattr(bootstrap, "choose_environment", lambda: tmp_path / "bin" / "python")
    monkeypatch.setattr(bootstrap, "torch_in", lambda python: next(found))
    monkeypatch.setattr(bootstrap, "torch_index", lambda: ["--extra-index-url", bootstrap.CPU_INDEX])
    monkeypatch.setattr(bootstrap, "call", lambda *command: calls.append([str(word) for word in command]))
    (tmp_path / "setup.py").touch()
    (tmp_path / "pyproject.toml").touch()
    bootstrap.set_up({"dev"})
    assert [bootstrap.CPU_INDEX in words for words in calls] == [True, False]  # torch alone comes from that index
    assert f"torch=={bootstrap.TORCH_PINNED}" in calls[0]
    assert (tmp_path / "compact-constraints.txt").read_text() == "torch==2.13.0\n"


def test_bootstrap_knows_which_torch_it_can_keep(bootstrap):
    kept = ["2.11.0", "2.11", "2.11.0+cu128", "2.13.0+cpu", "2.12.0a0+git1234", "3.0.0", "2.11.1"]
    replaced = ["2.10.1", "2.9.0+cpu", "1.13.1", "2.11.0a0+gitabc", "2.11.0.dev20260101", "2.11.0rc1", None, "unknown"]
    assert [version for version in kept + replaced if bootstrap.new_enough(version)] == kept


def test_bootstrap_without_a_command_shows_its_commands():
    result = subprocess.run([sys.executable, str(ROOT / "bootstrap.py")], capture_output=True, text=True)
    assert result.returncode == 2
    assert "bootstrap.py train" in result.stdout and "bootstrap.py test" in result.stdout
