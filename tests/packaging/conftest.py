"""The package as a stranger gets it: a wheel, installed outside the checkout.

Everything is made from a copy of the sources, so that the checkout stays as it is, and in that copy
lies what a checkout of long ago has built.
"""

import shutil
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from tests.support.installed import ROOT, STALE, Installed, run

SOURCES = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
SITE_PACKAGES = ("dist-packages", "site-packages")


# Where what has been made once is found by the other workers of pytest-xdist.
Make = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Make:
    base = tmp_path_factory.getbasetemp()
    shared = base if worker_id == "master" else base.parent

    def make(name: str, fill: Callable[[Path], None]) -> Path:
        folder, made = shared / name, shared / f"{name}.made"
        with FileLock(shared / f"{name}.lock"):
            if not made.exists():
                folder.mkdir()
                fill(folder)
                made.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def old_checkout(make_once: Make) -> Path:
    """Return a copy of the sources in which a wheel was built, in `out`.

    Before that, what was built long ago lay among them.
    """

    def build(folder: Path) -> None:
        copy_sources(folder)
        leave_old_builds(folder)
        pip = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps")
        run(*pip, "--no-index", "--wheel-dir", folder / "out", ".", folder=folder)

    return make_once("checkout", build)


def copy_sources(folder: Path) -> None:
    for name in SOURCES:
        shutil.copy(ROOT / name, folder)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "vllm_cost_meter"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)


def leave_old_builds(folder: Path) -> None:
    library = folder / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    for path in (
        *(folder / name for name in STALE),
        *(library / name for name in STALE),
        library / "vllm_cost_meter" / "pricing.py",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("built long ago")


@pytest.fixture(scope="session")
def wheel(old_checkout: Path) -> Path:
    (path,) = (old_checkout / "out").iterdir()
    return path


@pytest.fixture(scope="session")
def installed(wheel: Path, make_once: Make, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Install the wheel into an environment of its own, beside what this one has."""

    def install(folder: Path) -> None:
        venv.create(folder, with_pip=False)
        pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
        run(*pip, "install", "--no-deps", "--no-index", wheel, folder=folder)
        # vLLM and the dependencies are this environment's; its editable install is not seen.
        theirs = [
            each for each in sys.path if Path(each).name in ("site-packages", "dist-packages")
        ]
        (packages_of(folder) / "theirs.pth").write_text("\n".join(theirs) + "\n")

    folder = make_once("environment", install)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    return Installed(folder / "bin", elsewhere, packages_of(folder) / "vllm_cost_meter")


def packages_of(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder
