#!/usr/bin/env python3
"""Sets everything up, then runs one thing. Needs Python 3.10 to 3.13 and nothing else.

    python3 bootstrap.py train [RECIPE] [--key value …]    python -m compact.train
    python3 bootstrap.py test [PYTEST FLAGS …]             the tests
    python3 bootstrap.py python [ARGUMENTS …]              that Python, with the developers' tools

Where things go: into the virtual environment this is started from, if there is one (unless its torch is too old);
else into .venv beside this file. A torch that the starting Python already has is kept if it is new enough (.venv then
sees that Python's packages), and nothing installed here may replace it. Otherwise the pinned torch is installed:
the CPU build where there is no NVIDIA GPU and PyTorch's own index answers, else the package index's build.
A second run installs nothing unless pyproject.toml, setup.py, csrc/ or the starting Python's torch have changed.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent
TORCH_PINNED = "2.13.0"
TORCH_OLDEST = (2, 11)
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP_OR_GET_IT = (["pip", "--version"], ["ensurepip"])
EXTRAS = {"train": {"eval", "plot"}, "test": {"dev"}, "python": {"dev"}}  # dev includes eval and plot


def say(text):
    print(f"[bootstrap] {text}", file=sys.stderr, flush=True)


def stop(text):
    say(text)
    sys.exit(2)


def new_enough(version):
    """Whether a torch of this version is kept; 2.11.0a0 comes before 2.11, 2.12.0a0 does not."""
    found = re.match(r"(\d+)\.(\d+)(\.0)?(a|b|rc|\.dev)?", version or "")
    if not found:
        return False
    release = (int(found[1]), int(found[2]))
    return release > TORCH_OLDEST or (release == TORCH_OLDEST and not found[4])


def torch_here():
    """The version of the torch that the running Python sees, or None."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return None


def torch_in(python):
    code = "from importlib.metadata import version; print(version('torch'))"
    result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else None


def call(*command):
    command = [str(part) for part in command]
    if subprocess.call(command) != 0:
        stop(f"this failed, see above: {' '.join(command)}")


def make_environment(see_base):
    """.venv beside this file; returns its Python."""
    folder = ROOT / ".venv"
    python = folder / "bin" / "python"
    if python.exists():  # an interrupted run or another tool may have left it without pip
        if any(subprocess.run([python, "-m", *how], capture_output=True).returncode == 0 for how in PIP_OR_GET_IT):
            return python
        stop(f"{folder} is there but has no pip and cannot get it: delete it and start again")
    say(f"making {folder}" + (" (it sees this Python's packages)" if see_base else ""))
    try:
        import ensurepip  # noqa: F401  Debian and Ubuntu ship venv without it
        import venv  # noqa: F401
    except ImportError:
        release = f"{sys.version_info[0]}.{sys.version_info[1]}"
        stop(
            f"{sys.executable} cannot make virtual environments (no venv or ensurepip). On Debian or Ubuntu: "
            f"apt install python{release}-venv. Or start this from an activated environment of your own."
        )
    flags = ["--system-site-packages"] if see_base else []
    call(sys.executable, "-m", "venv", "--clear", *flags, folder)
    return python


def choose_environment():
    """The Python to install into (see the top of the file)."""
    version = torch_here()
    if sys.prefix != sys.base_prefix:
        if version is None or new_enough(version):
            return Path(sys.executable)
        say(f"this environment's torch {version} is older than 2.11 and is left alone")
        return make_environment(see_base=False)
    return make_environment(see_base=new_enough(version))


def torch_index():
    """Flags that make pip prefer the CPU build where that is what the machine needs."""
    if Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi"):
        return []
    try:
        with urllib.request.urlopen(f"{CPU_INDEX}/torch/", timeout=3):
            return ["--extra-index-url", CPU_INDEX]
    except OSError:
        return []


def set_up(extras):
    """Install what is missing; returns the environment's Python."""
    python = choose_environment()
    environment = python.parent.parent
    stamp = environment / "compact-setup.json"
    digest = hashlib.sha256(f"{ROOT} {sys.version} {torch_here()}".encode())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*.*"))):
        digest.update(path.read_bytes())
    try:
        have = json.loads(stamp.read_text())
    except (OSError, ValueError):  # none yet, or cut short by a full disk
        have = {}
    installed = set(have.get("extras", ())) if have.get("digest") == digest.hexdigest() else set()
    if extras <= installed or "dev" in installed:
        return python

    pip = [python, "-m", "pip", "install", "--disable-pip-version-check"]
    pip += [] if sys.stderr.isatty() else ["--quiet"]
    version = torch_in(python)
    if not new_enough(version):
        say(f"installing torch {TORCH_PINNED} into {environment}")
        call(*pip, f"torch=={TORCH_PINNED}", *torch_index())
        version = torch_in(python)
    else:
        say(f"keeping torch {version}")
    constraint = environment / "compact-constraints.txt"
    constraint.write_text(f"torch=={version}\n")
    extras = sorted(extras | installed)
    say(f"installing compact [{', '.join(extras)}] into {environment}")
    call(*pip, "--constraint", constraint, "--editable", f"{ROOT}[{','.join(extras)}]")
    stamp.write_text(json.dumps({"digest": digest.hexdigest(), "extras": extras}))
    return python


def main(arguments):
    command, flags = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in EXTRAS:
        print(__doc__)
        sys.exit(0 if command in ("-h", "--help") else 2)
    if not (3, 10) <= sys.version_info[:2] <= (3, 13):
        found = next(filter(None, (shutil.which(f"python3.{minor}") for minor in (13, 12, 11, 10))), None)
        hint = f"start it with {found}" if found else "install one of them"
        stop(f"Python 3.10 to 3.13 is needed, this is {sys.version.split()[0]}: {hint}")
    python = str(set_up(EXTRAS[command]))
    if command == "train":
        line = [python, "-m", "compact.train", *flags]
    elif command == "test":
        os.chdir(ROOT)
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        line = [python, "-m", "pytest", "-n", "2", *flags]
    else:
        line = [python, *flags]
    os.execv(python, line)


if __name__ == "__main__":
    main(sys.argv[1:])
