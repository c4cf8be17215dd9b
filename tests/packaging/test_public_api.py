"""The Python API answers a program outside the checkout as the side endpoint answers HTTP."""

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.support.installed import Installed
from tests.support.small_ledger import small_ledger
from vllm_cost_meter import __version__, open_ledger
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.endpoint.app import make_app

PROGRAM = Path(__file__).parent / "user_program.py"
PUBLIC = [
    "CostMeterError",
    "LedgerReader",
    "PriceBook",
    "__version__",
    "load_settings",
    "open_ledger",
]
LOADED = """
import sys
before = set(sys.modules)
import vllm_cost_meter
ours = {name for name in sys.modules.keys() - before if name[0] != "_"}
print(*sorted(name for name in ours if name.partition(".")[0] not in sys.stdlib_module_names))
"""
SHOWN = """
import vllm_cost_meter
for name in sorted(vllm_cost_meter.__all__):
    print(getattr(getattr(vllm_cost_meter, name), "__name__", name))
print(dir(vllm_cost_meter) == sorted(vllm_cost_meter.__all__))
try:
    vllm_cost_meter.nothing
except AttributeError as error:
    print(error)
"""
WRONG = """
from vllm_cost_meter import open_ledger, nothing

with open_ledger("ledger.db") as ledger:
    ledger.report(agregate="tenant")
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    small_ledger(folder).close()
    return folder / "ledger.db"


@pytest.fixture(scope="module")
def told(installed: Installed, path: Path) -> dict[str, Any]:
    """Run the program where only the wheel is."""
    program = installed.elsewhere / PROGRAM.name
    program.write_text(PROGRAM.read_text())
    found: dict[str, Any] = json.loads(installed.run("python", program, path))
    return found


def test_a_program_has_the_answers_of_the_side_endpoint(told: dict[str, Any], path: Path) -> None:
    book = load_settings({"COST_METER_GPU_HOUR_USD": "2.5"}).price_book
    with open_ledger(path, book=book) as reader:
        client = TestClient(make_app(reader), base_url="http://localhost")
        words = {"window": "2027-01", "aggregate": "tenant,day", "step": "1w"}
        report = client.get("/cost/report", params={**words, "idle": "proportional"}).json()
        assert told["report"] == report
        assert told["audit"] == client.get("/cost/audit").json()
        assert told["request"] == client.get("/cost/requests/chatcmpl-1").json()
        assert told["explain"] == client.get("/cost/requests/chatcmpl-1/explain").json()
        statement = reader.statement("2027-01", tenant="search", idle="proportional")
        assert told["statement"] == json.loads(json.dumps(statement))


def test_the_figures_of_a_program_are_those_of_the_ledger(told: dict[str, Any]) -> None:
    (piece,) = told["report"]["series"]
    usage = piece["rows"][0]
    assert (usage["tenant"], usage["day"], usage["gpu_time_ns"]) == ("search", "2027-01-15", 300)
    assert piece["gpu_time_ns"] == 300 + 1_000 + 50
    nanousd = round(Decimal("2.5") * 10**9 * piece["gpu_time_ns"] / (3600 * 10**9))
    assert piece["cost_nanousd"] == nanousd
    assert told["audit"]["balanced"]
    assert told["request"]["gpu_time_ns"] == 300
    assert told["nobody"] is None
    assert told["statement"]["tenant"] == "search"
    assert told["version"] == __version__
    assert told["usd"] == 1.0


def test_an_error_of_the_ledger_is_one_line_of_the_public_error(
    told: dict[str, Any], path: Path
) -> None:
    assert told["error"].startswith(f"ledger sqlite:///{path}.not: no such file; ")
    assert "\n" not in told["error"]


def test_the_package_shows_the_public_names_and_no_other(installed: Installed) -> None:
    *names, same, missing = installed.run("python", "-c", SHOWN).splitlines()
    assert names == PUBLIC
    assert same == "True"
    assert missing == "module 'vllm_cost_meter' has no attribute 'nothing'"


def test_importing_the_package_loads_its_version_only(installed: Installed) -> None:
    loaded = installed.run("python", "-c", LOADED).strip()
    assert loaded == "vllm_cost_meter vllm_cost_meter.version"


def test_a_type_checker_understands_a_program_and_finds_what_is_wrong(installed: Installed) -> None:
    folder = installed.elsewhere
    (folder / "good.py").write_text(PROGRAM.read_text())
    (folder / "wrong.py").write_text(WRONG)
    check = ("-m", "mypy", "--strict", "--python-executable", installed.bin / "python")
    assert installed.run("python", *check, "good.py").startswith("Success")
    wrong = installed.run("python", *check, "wrong.py", status=1)
    assert re.findall(r"^wrong.py:(\d+): error: .*\[(.+)\]$", wrong, re.MULTILINE) == [
        ("2", "attr-defined"),
        ("5", "call-arg"),
    ]
