"""The package as a stranger gets it: a wheel, installed outside the checkout.

Everything is made from a copy of the sources, so that the checkout stays as it is, and in that copy
lies what a checkout of long ago has built.
"""

import shutil
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from tests.support.installed import ROOT, STALE, Installed, run

SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")


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
