"""Create a virtual environment for the project, or say in one line what the machine lacks.

Usage: `python scripts/make_venv.py [--plain] DIRECTORY`, run by the Python for the environment. If
that Python has vLLM and the machine has an NVIDIA GPU, the environment uses both, and
`scripts/install_vllm_cpu.py` leaves that vLLM alone. `--plain` prevents this. The script uses only
the standard library and nothing newer than Python 3.7, so that an old Python prints a clear message
and not a syntax error.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

OLDEST = (3, 11)
VLLM_COMMAND = """\
#!{python}
import sys
from vllm.entrypoints.cli.main import main
# vLLM's spawned processes run this file too, under another name.
if __name__ == "__main__":
    sys.exit(main())
"""


def what_is_missing():
    """Return a pair for each missing thing: its name, and the Debian package that has it."""
    name = "python" + ".".join(map(str, sys.version_info[:2]))
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    compiler = os.environ.get("CC") or "cc"
    missing = []
    if importlib.util.find_spec("ensurepip") is None:
        missing.append(("venv with pip", f"{name}-venv"))
    if not header.exists():
        missing.append((str(header), f"{name}-dev"))
    if shutil.which(compiler.split()[0]) is None:
        missing.append((f"a C compiler ({compiler})", "gcc libc6-dev"))
    return missing


def fail(message):
    """End with a message in one line, and a status that is not 0."""
    sys.exit(f"make: {message}")


def has_nvidia_gpu():
    """Return whether `nvidia-smi` lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    listing = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, check=False)
    return listing.returncode == 0 and b"GPU" in listing.stdout


def build_on_installed_vllm(directory):
    """Create an environment that sees this Python's packages and has a `vllm` command."""
    venv.create(directory, clear=True, with_pip=True, system_site_packages=True)
    python = directory / "bin" / "python"
    site_packages = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        stdout=subprocess.PIPE,
        check=True,
    )
    if sys.prefix != sys.base_prefix:
        # This Python is in a virtual environment itself, and "system" means the Python below it.
        theirs = sysconfig.get_paths()
        lines = dict.fromkeys([theirs["purelib"], theirs["platlib"]])
        path = Path(site_packages.stdout.decode().strip()) / "installed_vllm.pth"
        path.write_text("\n".join(lines) + "\n")
    command = directory / "bin" / "vllm"
    command.write_text(VLLM_COMMAND.format(python=python))
    command.chmod(0o755)


def main(directory, plain):
    if sys.version_info < OLDEST:
        oldest, this = (".".join(map(str, version[:2])) for version in (OLDEST, sys.version_info))
        fail(
            f"Python {oldest} or newer is needed and {sys.executable} is {this}: name one with "
            "PYTHON=..., or: apt-get install python3.11 python3.11-venv python3.11-dev"
        )
    if Path(sys.prefix).resolve() == directory.resolve():
        fail(f"{directory} is active and must be created again: run `deactivate` first")
    missing = what_is_missing()
    if missing:
        what = " and ".join(what for what, _ in missing)
        fail(f"missing {what}: apt-get install {' '.join(package for _, package in missing)}")
    if not plain and importlib.util.find_spec("vllm") and has_nvidia_gpu():
        print("NVIDIA GPU and vLLM found: using them", flush=True)
        build_on_installed_vllm(directory)
    else:
        venv.create(directory, clear=True, with_pip=True)


if __name__ == "__main__":
    main(Path(sys.argv[-1]).absolute(), plain="--plain" in sys.argv[1:-1])
