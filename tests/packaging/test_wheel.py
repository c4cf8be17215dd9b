"""A wheel has the whole package and nothing else, and works where there is no checkout."""

import json
import re
import sysconfig
import zipfile
from pathlib import Path

from tests.support.installed import ROOT, STALE, Installed

NATIVE = f"vllm_cost_meter/attribution/_native{sysconfig.get_config_var('EXT_SUFFIX')}"

ENTRY_POINTS = """
import json
from importlib.metadata import distribution

found = {}
for entry in distribution("vllm-cost-meter").entry_points:
    assert callable(entry.load())
    found[entry.group] = [entry.name, entry.value]
print(json.dumps(found))
"""
WHERE = """
import vllm_cost_meter
from vllm_cost_meter.attribution import NATIVE, StepMeter, _native

assert NATIVE
assert StepMeter is _native.StepMeter
print(vllm_cost_meter.__file__)
print(_native.__file__)
"""


def test_a_wheel_has_every_module_its_native_part_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "vllm_cost_meter").rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc")
    }
    about = {name for name in names if re.match(r"vllm_cost_meter-[\d.]+\.dist-info/", name)}
    assert "vllm_cost_meter/py.typed" in sources
    assert names - about == sources | {NATIVE}
    assert {name.partition("/")[2] for name in about} == {
        *("METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt", "licenses/LICENSE")
    }


def test_what_was_built_long_ago_is_removed_from_the_sources(
    old_checkout: Path,
) -> None:
    assert [name for name in STALE if (old_checkout / name).exists()] == []


def test_the_native_part_of_the_wheel_is_the_one_in_use(installed: Installed) -> None:
    package, native = installed.run("python", "-c", WHERE).splitlines()
    assert Path(package) == installed.package / "__init__.py"
    assert Path(native) == installed.package.parent / NATIVE


def test_every_entry_point_of_the_wheel_loads(installed: Installed) -> None:
    found = json.loads(installed.run("python", "-c", ENTRY_POINTS).splitlines()[-1])
    assert found == {
        "console_scripts": ["vllm-cost-meter", "vllm_cost_meter.cli:app"],
        "vllm.endpoint_plugins": ["cost_meter", "vllm_cost_meter.plugin:EndpointPlugin"],
        "vllm.general_plugins": ["cost_meter", "vllm_cost_meter.plugin:register"],
        "vllm.stat_logger_plugins": ["cost_meter", "vllm_cost_meter.stats:CostStatLogger"],
    }


def test_the_command_of_the_wheel_finds_itself_well_installed(installed: Installed) -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    version = re.search(r'^version = "(.*)"$', metadata, re.MULTILINE)
    assert version is not None
    assert installed.run("vllm-cost-meter", "--version").strip() == version[1]
    ledger = f"sqlite:///{installed.elsewhere}/ledger.db"
    answer = json.loads(
        installed.run("vllm-cost-meter", "doctor", "--ledger", ledger, "--json").splitlines()[-1]
    )
    assert [finding for finding in answer["findings"] if not finding["ok"]] == []
