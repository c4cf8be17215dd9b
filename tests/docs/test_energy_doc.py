"""The page on energy: its reasons are all there are, the real arithmetic gives its example."""

import pytest

from tests.support.pages import DOCS, names, section, table_rows
from vllm_cost_meter.engine.energy import nvml as energy
from vllm_cost_meter.engine.energy.books import UNREPORTED_MAX
from vllm_cost_meter.engine.energy.shares import (
    POWER_WINDOW_NS_MIN,
    QUIET_CLASSES,
    PowerBounds,
    split_energy,
)
from vllm_cost_meter.ledger.queries.energy import PENDING

PAGE = DOCS / "explanation" / "energy.md"
TEXT = " ".join(PAGE.read_text().split())
MS, S = 10**6, 10**9


def test_the_reasons_are_those_of_the_code():
    assert names(PAGE, "What null means") == list(energy.REASONS)


def test_what_lasts_until_a_restart_is_what_the_code_never_asks_again():
    rows = table_rows(section(PAGE, "What null means"))
    lasting = {row[0].strip("`") for row in rows if row[2] == "restart"}
    assert lasting == set(energy.LASTING_REASONS)


def test_the_example_comes_out_as_written():
    bounds = PowerBounds(gpus=1, max_mw=700_000).after(70_000, S)
    busy_ns, quiet_ns = {"A": 80 * MS, "B": 20 * MS}, {"idle": 900 * MS}
    shares = split_energy(123_000, busy_ns, quiet_ns, bounds)
    by_time = split_energy(123_000, busy_ns | quiet_ns, {}, bounds)
    for name, time, even, divided in table_rows(section(PAGE, "An example by hand")):
        key = name.strip("`")
        gpu_ns = (busy_ns | quiet_ns)[key]
        share_mj = (shares.busy_mj | shares.quiet_mj)[key]
        assert time == f"{gpu_ns // MS} ms"
        assert even == f"{by_time.busy_mj[key] / 1000:.3f} J"
        assert divided == f"{share_mj / 1000:.3f} J"


def test_the_quiet_classes_are_those_of_the_code():
    *most, last = (f"`{name}`" for name in QUIET_CLASSES)
    assert f"{', '.join(most)} and {last} are *quiet*" in TEXT


@pytest.mark.parametrize(
    "said",
    [
        f"by more than {energy.POWER_MAX_W // 1000} kW can",
        f"at most {energy.POWER_MAX_W // 1000} kW; otherwise",
        f"stood still for {energy.COUNTER_PERIOD_NS_MAX // S} s",
        f"looks for it anew every {energy.RETRY_NS // S} s",
        f"any window of at least {POWER_WINDOW_NS_MIN // S} s",
        f"energy of at most {UNREPORTED_MAX:,} requests",
        f"null with the reason `{PENDING}`",
    ],
)
def test_the_numbers_are_those_of_the_code(said):
    assert said in TEXT
