"""The environment that builds on an installed vLLM gets a `vllm` command that can be spawned."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_venv.py"


@pytest.fixture
def command() -> str:
    spec = importlib.util.spec_from_file_location("make_venv", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.VLLM_COMMAND)


@pytest.mark.parametrize(("name", "runs"), [("__main__", 1), ("__mp_main__", 0)])
def test_vllm_runs_in_the_process_that_was_started_and_in_no_spawned_one(
    command: str, name: str, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    vllm = ModuleType("vllm.entrypoints.cli.main")
    vllm.main = lambda: calls.append(1)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli.main", vllm)
    try:
        exec(compile(command, "vllm", "exec"), {"__name__": name})
    except SystemExit:
        assert runs
    assert len(calls) == runs
