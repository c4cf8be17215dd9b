"""A FastAPI that keeps included routers as they are: are vLLM's routes found, do ours answer?

FastAPI 0.137 changed what an application knows of its routes. The lock file has an older one, so
the tests of routes run once more with this one, in a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.installed import ROOT

VERSION = "0.165.0"
# What asks an application for its routes, and what FastAPI serves of ours.
FILES = [
    "tests/component/api_server/test_unnamed.py",
    "tests/component/api_server/test_key_check.py",
    "tests/component/endpoint/test_tenant_routes.py",
]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install it into a folder of its own, without what it needs: that is here."""
    folder = tmp_path_factory.mktemp("fastapi")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, f"fastapi=={VERSION}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_tests_of_routes_pass_with_a_fastapi_that_keeps_routers_apart(installed: Path) -> None:
    path = os.pathsep.join([str(installed), str(ROOT), os.environ.get("PYTHONPATH", "")])
    asked = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": path}, "text": True}
    version = [sys.executable, "-c", "import fastapi; print(fastapi.__version__)"]
    assert subprocess.check_output(version, **asked).strip() == VERSION
    command = [sys.executable, "-m", "pytest", *FILES]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **asked)
    assert done.returncode == 0, done.stdout[-4_000:]
