"""The page on replies shows what clients get, to the byte; the page on hooks every hook."""

import re

from tests.support.pages import DOCS, names, section, table_rows
from vllm_cost_meter.api_server import reply_bytes as reply
from vllm_cost_meter.api_server.breaker import MISSES_IN_A_ROW_MAX
from vllm_cost_meter.config.settings import Settings
from vllm_cost_meter.guard import ERRORS_IN_A_ROW_MAX
from vllm_cost_meter.vllm_hooks import canary, scheduler

REPLIES, HOOKS = DOCS / "reference" / "headers-and-streams.md", DOCS / "reference" / "hooks.md"
COST = reply.ReplyCost(
    gpu_time_ns=80_742_957,
    prefill_ns=3_373_512,
    decode_ns=77_369_445,
    cost_nanousd=56_071,
    marginal_ns=70_112_233,
    marginal_cost_nanousd=48_689,
    http_request_id="cost-54b9563aa6ec46049a6fa2d2a838bcdb",
    tenant="chat-team",
    method="shapley",
)


def test_the_headers_are_those_that_are_sent():
    sent = [name.decode() for name, _ in reply.headers(COST)]
    assert names(REPLIES, "Complete replies") == sent


def test_the_usage_of_the_stream_is_what_a_stream_gets():
    shown = "".join(
        line.strip() for line in section(REPLIES, "Streams").splitlines() if line[:4] == "    "
    )
    event = (
        b'data: {"choices":[],"usage":{"prompt_tokens":26,"total_tokens":74,'
        b'"completion_tokens":48}}\n\n'
    )
    edited = reply.insert_usage(event, COST).decode()
    assert edited.partition('"choices":[],')[2].removesuffix("}\n\n") in shown


def test_the_comment_is_what_a_stream_gets():
    assert f"    {reply.comment(COST).decode().rstrip()}\n" in REPLIES.read_text()


def test_the_settings_are_those_of_the_code():
    rows = table_rows(section(REPLIES, "What a reply says, as a setting"))[1:]
    assert [row[0].split("`")[1] for row in rows] == ["all", "headers", "none"]
    fields = Settings.model_fields
    assert f"`{fields['reply'].default}` (the default)" in rows[0][0]
    text = " ".join(REPLIES.read_text().split())
    assert f"`COST_METER_BILL_TIMEOUT_MS` ({fields['bill_timeout_ms'].default} ms)" in text
    assert f"After {MISSES_IN_A_ROW_MAX} misses in a row" in text


def test_every_hook_is_documented_and_no_other():
    engine = {name.rpartition(".")[2] for name in names(HOOKS, "In the engine process")}
    ours = {
        name
        for name in vars(scheduler.MeteredScheduler)
        if callable(vars(scheduler.MeteredScheduler)[name])
    }
    added = {"get_scheduler_cls", "sleep", "wake_up", "execute_dummy_batch"}
    added |= {"cost_meter_snapshot", "cost_meter_stop"}
    assert engine == ours | added
    api = set(re.findall(r"`(\w+\.\S+?)`", section(HOOKS, "In the API servers")))
    hooked = {f"OutputProcessor.{name}" for name in canary.OUTPUT_PROCESSOR}
    assert api == hooked | {"EngineArgs.add_cli_args", "vllm.plugins.load_plugins_by_group"}


def test_the_carriers_name_and_the_limit_are_those_of_the_code():
    text = " ".join(HOOKS.read_text().split())
    assert f"`{scheduler.CARRIER_ID}`" in text
    assert f"After {ERRORS_IN_A_ROW_MAX} failures of one hook in a row" in text
