"""The package as a stranger gets it: a wheel, installed outside the checkout.

Everything is made from a copy of the sources, so that the checkout stays as it is, and in that copy
lies what a checkout of long ago has built.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
# What earlier versions of setup.py have built, or an earlier Python.
STALE = (
    "vllm_cost_meter/_attribution_c.cpython-311-x86_64-linux-gnu.so",
    "vllm_cost_meter/attribution/_fit.cpython-311-x86_64-linux-gnu.so",
)


@dataclass(frozen=True, slots=True)
class Installed:
    """An environment with the wheel, and a folder outside the checkout to run things in."""

    bin: Path
    elsewhere: Path
    package: Path

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run a command of the environment in the folder, and return what it prints."""
        program, *arguments = command
        return run(self.bin / program, *arguments, folder=self.elsewhere, status=status)


def run(*command: str | Path, folder: Path, status: int = 0) -> str:
    """Run a command that knows neither the checkout nor a setting, and return what it prints."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name != "PYTHONPATH" and not name.startswith("COST_METER_")
    }
    done = subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)
    assert done.returncode == status, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def old_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the sources, and lay what was built long ago among them."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "vllm_cost_meter"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    library = folder / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for path in (
        *(folder / name for name in STALE),
        *(library / name for name in STALE),
        library / "vllm_cost_meter" / "pricing.py",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("built long ago")
    return folder


@pytest.fixture(scope="session")
def wheel(old_checkout: Path) -> Path:
    out = old_checkout / "out"
    build = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
    run(*build, "--no-index", "--wheel-dir", out, ".", folder=old_checkout)
    (path,) = out.iterdir()
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel into an environment of its own, beside what this one has."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", wheel, folder=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # vLLM and the dependencies are this environment's; the editable install of it is not seen.
    theirs = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "theirs.pth").write_text("\n".join(theirs) + "\n")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return Installed(folder / "bin", elsewhere, packages / "vllm_cost_meter")
