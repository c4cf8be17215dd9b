"""What an engine's process loads of ours: all that measures, and nothing of the shop.

Goal: EngineCore and every worker pay start-up time and memory only for what they use. Method: a
process of its own installs the hooks as vLLM's plugin loader does, imports what the making of a
meter imports, and prints what it has loaded.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import sys
from vllm_cost_meter import plugin
plugin.register()
from vllm_cost_meter.vllm_hooks import devices, model_counts, scheduler
print("loaded", *sorted(name for name in sys.modules if name.startswith("vllm_cost_meter.")))
"""
SHOP = ("api_server", "config.settings", "economics", "endpoint", "invoices", "ledger", "reports")


@pytest.fixture(scope="module")
def loaded():
    environment = {**os.environ, "VLLM_PLUGINS": "cost_meter"}
    environment.pop("COST_METER_PURE_PYTHON", None)
    child = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, check=True, capture_output=True, text=True
    )
    said = next(line for line in child.stdout.splitlines() if line.startswith("loaded "))
    return [name.removeprefix("vllm_cost_meter.") for name in said.split()[1:]]


def test_an_engine_loads_what_measures(loaded):
    assert {"engine.meter", "attribution._native", "vllm_hooks.scheduler"} <= set(loaded)


def test_an_engine_loads_no_twin_of_the_native_part(loaded):
    assert [name for name in loaded if name.endswith("_py")] == []


def test_an_engine_loads_nothing_of_the_shop(loaded):
    assert [n for n in loaded if any(n == room or n.startswith(f"{room}.") for room in SHOP)] == []


def test_contributing_says_how_many_modules_an_engine_loads(loaded):
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    counts = re.findall(r"An engine loads (\d+) of our modules", contributing)
    assert [int(count) for count in counts] == [len(loaded)], loaded
