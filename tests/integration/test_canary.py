"""A vLLM that the meter does not understand serves as if the meter were not there, and says why.

Every callable that is hooked or called, and every record that is read, is taken from the canary's
own list and changed, one at a time, in a process that then loads vLLM's plugins as `vllm serve`
would; one is changed on a real server.
"""

import hashlib
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.probe import Probe
from tests.integration.server import Server
from tests.integration.traffic import ask
from vllm_cost_meter.lab.server import meter_arguments
from vllm_cost_meter.vllm_hooks import canary


def callables(listed: canary.Listed) -> list[str]:
    return [
        f"{module}:{name}.{method}" if name else f"{module}:{method}"
        for (module, name), methods in listed.items()
        for method in methods
    ]


WHEN_NAMED = callables(canary.WHEN_NAMED)
LAST_FIELDS = [(f"{module}:{name}", fields[-1]) for (module, name), fields in canary.FIELDS.items()]
SAYS_UNMETERED = "is left untouched and runs unmetered"


def changed(name: str) -> str:
    return f"import cost_meter_tests; cost_meter_tests.change_signature({name!r})"


def without(name: str) -> str:
    module, _, attributes = name.partition(":")
    owner, _, attribute = attributes.rpartition(".")
    # None, and not deleted: what a base class has by that name would show.
    return f"import importlib; importlib.import_module({module!r}).{owner}.{attribute} = None"


def without_field(name: str, field: str) -> str:
    """Return code that gives a record's class the fields it has without one."""
    module, _, record = name.partition(":")
    return f"""
import dataclasses, importlib
module = importlib.import_module({module!r})
record = module.{record}
class Fewer:
    __struct_fields__ = tuple(
        name
        for name in (getattr(record, "__struct_fields__", ()) or record.__dataclass_fields__)
        if name != {field!r}
    )
module.{record} = Fewer
"""


def the_line(probe: Probe) -> str:
    """Return the only line in which the meter speaks; there is no traceback of its."""
    [line] = [line for line in probe.output.splitlines() if "cost meter" in line]
    assert "Traceback" not in probe.output
    return line


def assert_untouched(answer: dict[str, Any]) -> None:
    assert answer["ours"] == ["EngineArgs.add_cli_args"], "the flags, which name it"
    assert answer["stat_loggers"] == []
    assert answer["middleware"] == []


def test_this_vllm_is_understood_and_hooked(probe: Probe) -> None:
    """That the tests below see hooks where there are some."""
    answer = probe("--plugins", "cost_meter")
    assert "cost meter" not in probe.output
    assert answer["middleware"] == ["CostMiddleware"]
    assert {"EngineCore.sleep", "SchedulerConfig.get_scheduler_cls"} < set(answer["ours"])
    canary.check_all()


@pytest.mark.parametrize("name", WHEN_NAMED)
def test_a_changed_signature_is_refused_with_one_line_that_names_it(
    probe: Probe, name: str
) -> None:
    answer = probe("--plugins", "cost_meter", before=changed(name))
    assert_untouched(answer)
    line = the_line(probe)
    assert SAYS_UNMETERED in line
    expected, _, found = line.partition(", found (")
    assert f"expected {name.replace(':', '.')}(" in expected
    assert "horizon" in found
    assert canary.WHAT_TO_DO in line


@pytest.mark.parametrize("name", WHEN_NAMED)
def test_what_is_gone_is_refused_with_one_line_that_names_it(probe: Probe, name: str) -> None:
    answer = probe(VLLM_PLUGINS="cost_meter", before=without(name))
    assert_untouched(answer)
    line = the_line(probe)
    assert SAYS_UNMETERED in line
    assert f"expected {name.replace(':', '.')}(" in line
    assert "found no such name" in line


@pytest.mark.parametrize(("name", "field"), LAST_FIELDS)
def test_a_record_without_a_field_that_is_read_is_refused_with_one_line_that_names_it(
    probe: Probe, name: str, field: str
) -> None:
    answer = probe("--plugins", "cost_meter", before=without_field(name, field))
    assert_untouched(answer)
    line = the_line(probe)
    assert SAYS_UNMETERED in line
    assert f"expected {name.replace(':', '.')} with the fields {field}, found" in line


def test_a_command_line_that_is_not_understood_gets_no_flags_and_no_hooks(probe: Probe) -> None:
    [name] = callables(canary.COMMAND_LINE)
    answer = probe(VLLM_PLUGINS="cost_meter", before=changed(name))
    assert answer["ours"] == answer["stat_loggers"] == answer["middleware"] == []
    assert f"expected {name.replace(':', '.')}(parser), found (horizon, " in the_line(probe)


def test_a_loading_of_plugins_that_is_not_understood_is_left_alone(probe: Probe) -> None:
    [name] = callables(canary.PLUGIN_LOADING)
    answer = probe(VLLM_PLUGINS="cost_meter", before=changed(name))
    assert answer["ours"] == answer["middleware"] == []
    assert f"expected {name.replace(':', '.')}(group), found (horizon, " in the_line(probe)


@pytest.mark.parametrize("name", callables(canary.STAT_LOGGER))
def test_stat_loggers_that_are_not_understood_cost_the_latencies_only(
    probe: Probe, name: str
) -> None:
    answer = probe("--plugins", "cost_meter", before=changed(name))
    assert answer["stat_loggers"] == []
    assert answer["middleware"] == ["CostMiddleware"]
    line = the_line(probe)
    assert (
        f"no latency metrics; everything else is metered: expected {name.replace(':', '.')}" in line
    )


def test_a_real_server_whose_scheduler_changed_serves_all_but_who_fails_closed_unmetered(
    work: Path,
) -> None:
    server = Server(
        work / "changed",
        arguments=meter_arguments(),
        environment={"CMT_CHANGED": "vllm.v1.core.sched.scheduler:Scheduler.schedule"},
        config='[[tenants]]\nname = "strict"\nfail_closed = true\n'
        f'api_key_sha256 = ["{hashlib.sha256(b"any-key").hexdigest()}"]\n',
    )
    try:
        server.start()
        with server.client() as client:
            for options in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
                reply = ask(client, "/v1/chat/completions", max_tokens=3, **options)
                assert reply.status == 200
                assert reply.output_tokens == 3
                assert not [name for name in reply.headers if "cost" in name]
                assert b"cost" not in reply.body
        with server.client("strict") as client:
            body = {"model": "tiny", "prompt": "Hi", "max_tokens": 3}
            refused = client.post("/v1/completions", json=body)
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "cost_meter_stale"
        samples = httpx.get(f"{server.url}/metrics").text.splitlines()
        counted = [line for line in samples if line.startswith("cost_meter_")]
        assert not [line for line in counted if "_created" not in line and line[-4:] != " 0.0"]
    finally:
        server.stop()
    [line] = [line for line in server.log.splitlines() if "cost meter" in line]
    assert SAYS_UNMETERED in line
    assert "expected vllm.v1.core.sched.scheduler.Scheduler.schedule(self), found (self, " in line
    assert not server.ledger_file.exists()
