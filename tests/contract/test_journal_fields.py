"""Goal: a journal that another version of the meter left behind can be read.

Method: the fields without a default, of every record that a journal holds and all that is in it,
are compared with those of the first version of the format. A reader needs these. Whatever came
later must have a default, or the applier would stop at the first record of an older server.
"""

import dataclasses
import typing

from vllm_cost_meter.journal.entries import KINDS

# What was there first, or came whole behind a field with a default. Nothing may be added.
FIRST = {
    "EngineRequest": {
        *("bill", "cost_nanousd", "external_id", "finished_at_ns", "http_request_id", "latencies"),
        *("lora", "marginal_cost_nanousd", "model", "owner", "prompt_group", "response_id"),
        *("route", "started_at_ns"),
    },
    "Bill": {
        *("batch", "cached_tokens", "engine_status", "first_model", "last_model", "method"),
        *("output_tokens", "pieces", "preemptions", "prompt_tokens", "request_id", "run_id"),
        *("seq", "steps"),
    },
    "UsagePiece": {"decode_ns", "decode_tokens", "hour", "prefill_ns", "prefill_tokens"},
    "Owner": {"tenant"},
    "NamedBy": {"kind"},
    "Latencies": set(),
    "HttpRequest": {
        *("cost_nanousd", "finished_at_ns", "gpu_time_ns", "http_request_id", "model", "owner"),
        *("response_id", "route", "started_at_ns", "status", "streamed", "usage", "x_request_id"),
    },
    "Usage": set(),
    "OpenRequest": {
        *("external_id", "http_request_id", "lora", "model", "owner", "prompt_group"),
        *("request_id", "response_id", "route", "started_at_ns", "x_request_id"),
    },
    "Snapshot": {
        *("billed_ns", "busy_ns", "engine", "errors", "kv_cache_usage", "last_seq", "number"),
        *("own_ns", "prior", "run_id", "running", "started_at_ns", "state", "steps"),
        *("taken_at_ns", "totals", "waiting", "wall_ns"),
    },
    "EngineIdentity": {
        *("engine_index", "gpus", "hardware", "method", "model", "native", "parallelism"),
        "vllm_version",
    },
    "ClassTotals": set(),
    "CostModel": {"version", "form", "planes", "steps", "error_two_planes", "explained"},
    "LearntCurve": {"coefficients", "experts", "layers", "captured"},
    "RunEnergy": {"energy_mj", "reason"},
    "RequestEnergy": {"energy_mj", "hour", "reason", "seq"},
    "Accrued": set(),
    "Price": {"effective_from_ns", "price_id", "source", "usd_per_gpu_hour"},
}


def records(of: object, seen: dict[str, type]) -> dict[str, type]:
    """Return all dataclasses and named tuples in a type, by name."""
    is_record = dataclasses.is_dataclass(of) or hasattr(of, "_fields")
    if isinstance(of, type) and is_record and of.__name__ not in seen:
        seen[of.__name__] = of
        for hint in typing.get_type_hints(of).values():
            records(hint, seen)
    for inner in typing.get_args(of):
        records(inner, seen)
    return seen


def required(record: type) -> set[str]:
    if dataclasses.is_dataclass(record):
        return {
            field.name
            for field in dataclasses.fields(record)
            if field.default is field.default_factory is dataclasses.MISSING
        }
    return set(record._fields) - set(record._field_defaults)


def test_no_record_of_a_journal_needs_a_field_that_came_later():
    found: dict[str, type] = {}
    for kind in KINDS.values():
        records(kind, found)
    assert {name: required(record) for name, record in found.items()} == FIRST
