"""`make` builds anew what has changed, and leaves nothing that was built long ago."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.installed import ROOT

IGNORED = [
    line for line in (ROOT / ".gitignore").read_text().splitlines() if line and line[0] != "#"
]
BUILT_FROM = [
    "pyproject.toml",
    "setup.py",
    "scripts/make_venv.py",
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir()),
]


def make(*arguments: str | Path, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run make as if no other make had started the tests."""
    kept = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    command = ("make", "--no-print-directory", *arguments)
    return subprocess.run(command, cwd=folder, env=kept, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Give a folder with something of everything that git ignores, and sources."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    source = tmp_path / "vllm_cost_meter" / "units" / "time.py"
    source.parent.mkdir(parents=True)
    source.touch()
    for pattern in IGNORED:
        name = pattern.strip("/").replace("*", "name")
        # What is no path from the top may lie in any folder.
        path = tmp_path / name if pattern.startswith("/") else source.parent / name
        if pattern.endswith("/"):
            path.mkdir()
            path /= "file"
        path.touch()
    return tmp_path


def test_clean_removes_all_that_git_ignores_and_no_source(checkout: Path) -> None:
    old = checkout / "vllm_cost_meter" / "_attribution_c.cpython-311-x86_64-linux-gnu.so"
    old.touch()
    assert make("clean", folder=checkout).returncode == 0
    left = {str(path.relative_to(checkout)) for path in checkout.rglob("*") if path.is_file()}
    assert left == {"Makefile", "vllm_cost_meter/units/time.py"}


def test_help_tells_of_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    told = re.findall(r"^make ([a-z-]+)", make("help").stdout, re.MULTILINE)
    assert sorted(told) == sorted(set(phony[1].split()) - {"help"})


@pytest.mark.parametrize("changed", [None, *BUILT_FROM])
def test_the_environment_is_made_anew_when_what_it_is_made_from_changes(
    changed: str | None, tmp_path: Path
) -> None:
    for name in (".made", ".meter"):
        (tmp_path / name).touch()
    as_if = () if changed is None else ("--what-if", changed)
    done = make("--question", *as_if, f"VENV={tmp_path}", tmp_path / ".meter")
    assert done.returncode == (changed is not None), done.stderr
