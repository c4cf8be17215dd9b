"""Named, or inert: what the plugin does to vLLM when it is not named, and how it can be named.

Most of it needs no server: a process of its own loads vLLM's plugins as `vllm serve` would and says
what changed. Another plugin, `cost_meter_tests`, is installed beside ours throughout.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from tests.integration.probe import Probe
from tests.integration.server import Server
from vllm_cost_meter.lab.server import meter_arguments
from vllm_cost_meter.plugin import GROUPS_LOADED_BY_DEFAULT

HALF_A_MINUTE_S = 30


def test_installed_but_not_named_it_changes_nothing_and_says_so_once(probe: Probe) -> None:
    answer = probe()
    assert not any(answer[hook] for hook in ("scheduler", "engine", "outputs"))
    assert answer["stat_loggers"] == []
    assert answer["endpoint_plugins"] == []
    assert answer["middleware"] == []
    assert not answer["ledger_loaded"]
    assert answer["other_plugin_loaded"]
    assert probe.output.count("installed but not named") == 1


def test_named_by_the_variable_it_is_active(probe: Probe) -> None:
    answer = probe(VLLM_PLUGINS="cost_meter")
    assert answer["scheduler"]
    assert answer["engine"]
    assert answer["outputs"]
    assert answer["stat_loggers"] == ["CostStatLogger"]
    assert answer["middleware"] == ["CostMiddleware"]
    assert not answer["other_plugin_loaded"], "VLLM_PLUGINS is an allowlist"


def test_named_by_the_flag_it_is_active_and_switches_nothing_else_off(probe: Probe) -> None:
    answer = probe("--plugins", "cost_meter")
    assert answer["scheduler"]
    assert answer["engine"]
    assert answer["outputs"]
    assert answer["middleware"] == ["CostMiddleware"]
    named = set(answer["VLLM_PLUGINS"].split(","))
    assert {"cost_meter", "cost_meter_tests", "lora_filesystem_resolver"} <= named
    assert answer["other_plugin_loaded"]
    assert "installed but not named" not in probe.output
    assert "vllm.endpoint_plugins" not in GROUPS_LOADED_BY_DEFAULT


def test_the_flag_adds_to_the_variable_where_that_is_set(probe: Probe) -> None:
    answer = probe("--plugins=cost_meter,x", VLLM_PLUGINS="cost_meter,a")
    assert answer["VLLM_PLUGINS"] == "cost_meter,a,x"


def test_the_flag_may_name_others_and_leave_the_meter_inert(probe: Probe) -> None:
    answer = probe("--plugins", "cost_meter_tests")
    assert not answer["scheduler"]
    assert "cost_meter" not in answer["VLLM_PLUGINS"].split(",")
    assert answer["stat_loggers"] == []


def test_left_out_by_the_variable_it_is_never_loaded(probe: Probe) -> None:
    probe("--plugins", "cost_meter", VLLM_PLUGINS="other")
    assert probe.status != 0
    assert "unrecognized arguments: --plugins" in probe.output


def test_it_steps_aside_should_vllm_grow_the_flag(probe: Probe) -> None:
    before = """
from vllm.engine.arg_utils import EngineArgs
original = EngineArgs.add_cli_args
def grown(parser):
    parser.add_argument("--plugins", default="vllm's own")
    return original(parser)
EngineArgs.add_cli_args = staticmethod(grown)
"""
    answer = probe(before=before, VLLM_PLUGINS="cost_meter")
    assert answer["plugins_flag"] == "vllm's own"
    assert answer["scheduler"]


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"COST_METER_GPU_HOUR_USD": "cheap"}, "COST_METER_GPU_HOUR_USD (environment): expected"),
        ({"COST_METER_GPU_HOURS_USD": "1"}, "COST_METER_GPU_HOURS_USD"),
        ({"COST_METER_HOST": "0.0.0.0"}, "COST_METER_ADMIN_TOKEN"),  # noqa: S104
        ({"COST_METER_LEDGER": "sqlite:////proc/no/ledger.db"}, "ledger"),
    ],
)
def test_a_wrong_setting_stops_the_start_with_one_line(
    probe: Probe, environment: dict[str, str], says: str
) -> None:
    probe(**{"VLLM_PLUGINS": "cost_meter", **environment})
    assert probe.status != 0
    lines = [line for line in probe.output.splitlines() if line.startswith("cost meter:")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in probe.output


def test_a_wrong_setting_does_not_matter_while_inert(probe: Probe) -> None:
    probe(COST_METER_GPU_HOUR_USD="cheap")
    assert probe.status == 0


def test_the_config_flag_reaches_child_processes_and_is_checked(
    probe: Probe, tmp_path: Path
) -> None:
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text("gpu_hour_usd = 1.5\n")
    bad.write_text("gpu_hour_usd = -1\n")
    for order in (0, 1):
        flags = [("--plugins", "cost_meter"), ("--cost-meter-config", str(good))]
        arguments = [word for flag in (flags[order], flags[1 - order]) for word in flag]
        answer = probe(*arguments)
        assert answer["COST_METER_CONFIG"] == str(good)
        assert answer["scheduler"]
        wrong = [word if word != str(good) else str(bad) for word in arguments]
        probe(*wrong)
        assert probe.status != 0
        assert "gpu_hour_usd" in probe.output


class Beside(NamedTuple):
    """Two servers, one that is not named and one whose side port it holds; and what the books of
    the shared one said before and after they were started, with nothing sent to it."""

    inert: Server
    named: Server
    books: tuple[Mapping[str, Any], Mapping[str, Any]]


@pytest.fixture(scope="module")
def beside(work: Path, server: Server) -> Iterator[Beside]:
    before, began_s = server.balanced()["runs"][0], time.monotonic()
    inert = Server(work / "inert", metered=False)
    named = Server(work / "named", price=None, side_port=inert.port)
    named.arguments = meter_arguments()
    try:
        # vLLM takes its port before it starts its engine, and the side endpoint comes after that.
        for each in (inert, named):
            each.launch()
        for each in (inert, named):
            each.wait()
        time.sleep(max(0.0, began_s + HALF_A_MINUTE_S - time.monotonic()))
        yield Beside(inert, named, (before, server.balanced()["runs"][0]))
    finally:
        inert.stop()
        named.stop()


def test_the_books_still_balance_after_half_a_minute_without_requests(beside: Beside) -> None:
    before, after = beside.books
    assert after["requests_ns"] == before["requests_ns"]
    assert after["idle_ns"] - before["idle_ns"] > (HALF_A_MINUTE_S - 1) * 1e9
    assert after["alive"]


def test_a_taken_port_is_one_warning_and_inert_serves_beside(beside: Beside) -> None:
    """One real server that is not named, and one named whose side port it holds."""
    inert, named, _ = beside
    for server, is_metered in ((inert, False), (named, True)):
        with server.client() as client:
            body = {"model": "tiny", "prompt": "a", "max_tokens": 2}
            reply = client.post("/v1/completions", json=body)
        assert reply.status_code == 200
        ours = [name for name in reply.headers if name.startswith("x-cost-meter")]
        assert bool(ours) == is_metered
        # Without a price there is GPU time and no cost, never 0.
        assert "x-cost-meter-cost-usd" not in reply.headers
        assert "x-litellm-response-cost" not in reply.headers
        assert ("x-cost-meter-gpu-seconds" in reply.headers) == is_metered
    assert named.log.count("side endpoint could not listen") == 1
    assert not inert.ledger_file.exists()
    with named.client() as client:
        sent = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"model": "tiny", "prompt": "a", "max_tokens": 2, **sent}
        told = client.post("/v1/completions", json=body).text
        assert '"cost_details":{"gpu_seconds":' in told
        assert '"cost":' not in told
    assert httpx.get(f"{inert.url}/metrics").text.count("cost_meter_") == 0
