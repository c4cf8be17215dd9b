"""The canary: check that this vLLM has the names and signatures the meter needs, before hooking it.

This file lists every vLLM name that the meter hooks, calls or reads, with the parameters that hooks
pass or read, and with the fields of vLLM's records. If a vLLM differs anywhere in the list, the
meter leaves all of it untouched, because half a meter would keep books that do not add up. The
canary checks what is there, never versions. What only makes bills more exact (the features of
requests), or tells what a KV connector brought, may be missing.

A callable is understood if its parameters begin with those listed and it can be called without
others. Hooks pass on all other arguments, so new optional parameters do no harm.

Invariant: nothing here changes vLLM, and it raises nothing but VllmMismatchError.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import vllm

from vllm_cost_meter.errors import VllmMismatchError

Parameters = Mapping[str, tuple[str, ...]]

WHAT_TO_DO = (
    "To be metered, use a vLLM that the meter's README names, or a newer meter: "
    "`vllm-cost-meter doctor` compares them without a server."
)

# The scheduler class that vLLM or the operator chose is checked against this list, too.
SCHEDULER: Parameters = {
    "schedule": ("self",),
    "update_from_output": ("self", "scheduler_output", "model_runner_output"),
    "_free_request": ("self", "request"),
    "add_request": ("self", "request"),
    "get_request_counts": ("self",),
}
OUTPUT_PROCESSOR: Parameters = {
    "add_request": ("self", "request", "prompt", "parent_req", "request_index", "queue"),
    "process_outputs": ("self", "engine_core_outputs"),
}
ENGINE_CORE: Parameters = {
    "sleep": ("self",),
    "wake_up": ("self",),
    "is_sleeping": ("self",),
    "execute_dummy_batch": ("self",),
}

# Callables by (module, class); the class "" means the module itself.
Listed = Mapping[tuple[str, str], Parameters]
# These are hooked wherever the meter is installed.
PLUGIN_LOADING: Listed = {("vllm.plugins", ""): {"load_plugins_by_group": ("group",)}}
COMMAND_LINE: Listed = {("vllm.engine.arg_utils", "EngineArgs"): {"add_cli_args": ("parser",)}}
# These are hooked or called where the meter is named.
WHEN_NAMED: Listed = {
    ("vllm.config", "SchedulerConfig"): {"get_scheduler_cls": ("self",)},
    ("vllm.v1.core.sched.scheduler", "Scheduler"): SCHEDULER,
    ("vllm.v1.engine.core", "EngineCore"): ENGINE_CORE,
    ("vllm.v1.engine.output_processor", "OutputProcessor"): OUTPUT_PROCESSOR,
    ("vllm.v1.engine.core_client", "AsyncMPClient"): {
        "_call_utility_async": ("self", "method", "args", "engine"),
    },
}
# The stat logger subclasses this. It is checked when vLLM loads the stat logger, which imports it.
STAT_LOGGER: Listed = {
    ("vllm.v1.metrics.loggers", "AggregateStatLoggerBase"): {
        "record": ("self", "scheduler_stats", "iteration_stats", "mm_cache_stats", "engine_idx"),
        "log_engine_initialized": ("self",),
        "record_sleep_state": ("self", "is_awake", "level"),
    },
}
# The hooks read these fields, or make records with them.
FIELDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    ("vllm.v1.core.sched.output", "SchedulerOutput"): (
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "total_num_scheduled_tokens",
        "scheduled_spec_decode_tokens",
        "preempted_req_ids",
    ),
    ("vllm.v1.core.sched.output", "NewRequestData"): ("req_id", "num_computed_tokens"),
    ("vllm.v1.core.sched.output", "CachedRequestData"): (
        "req_ids",
        "resumed_req_ids",
        "num_computed_tokens",
    ),
    ("vllm.v1.outputs", "ModelRunnerOutput"): ("req_id_to_index", "sampled_token_ids"),
    ("vllm.v1.engine", "EngineCoreRequest"): (
        "request_id",
        "external_req_id",
        "lora_request",
        "arrival_time",
    ),
    ("vllm.v1.engine", "EngineCoreOutput"): ("request_id", "new_token_ids", "trace_headers"),
    ("vllm.v1.engine", "EngineCoreOutputs"): ("outputs",),
}

# What requests need beside the model. These names are read where vLLM has them: a feature whose
# names are missing is not metered apart. `parameters` are those of a request's constructor.
LORA, GUIDED, ENCODER = "LoRA", "guided decoding", "encoders"
REQUEST = ("vllm.v1.request", "Request")
FEATURE_PARAMETERS = {LORA: "lora_request", ENCODER: "mm_features"}
FEATURE_ATTRIBUTES = {GUIDED: "use_structured_output"}
FEATURE_FIELDS: Mapping[str, Mapping[tuple[str, str], tuple[str, ...]]] = {
    ENCODER: {
        ("vllm.v1.core.sched.output", "SchedulerOutput"): ("scheduled_encoder_inputs",),
        ("vllm.multimodal.inputs", "MultiModalFeatureSpec"): ("mm_position",),
        ("vllm.multimodal.inputs", "PlaceholderRange"): ("length",),
    },
}

# What tells tokens that came over a KV connector from those of the engine's own prefix cache.
EXTERNAL_TOKENS = ("vllm.v1.metrics.stats", "PrefillStats")
EXTERNAL_TOKENS_FIELDS = ("num_local_cached_tokens", "num_external_cached_tokens")


def check(listed: Listed) -> None:
    """Raise VllmMismatchError unless everything listed can be called as the meter calls it."""
    for (module, name), callables in listed.items():
        check_callables(find(module, name), callables, f"{module}.{name}".rstrip("."))


def check_when_named() -> None:
    """Raise VllmMismatchError unless vLLM has everything that a named meter needs."""
    check(WHEN_NAMED)
    for (module, name), fields in FIELDS.items():
        check_fields(find(module, name), fields, f"{module}.{name}")


def missing_features() -> dict[str, str]:
    """Return why a feature of requests cannot be read from this vLLM, by feature."""
    found = {}
    for feature in (LORA, GUIDED, ENCODER):
        try:
            _check_feature(feature)
        except VllmMismatchError as error:
            found[feature] = str(error)
    return found


def missing_external_tokens() -> str:
    """Return why this vLLM does not count what a KV connector brings; empty if it does."""
    try:
        check_fields(find(*EXTERNAL_TOKENS), EXTERNAL_TOKENS_FIELDS, ".".join(EXTERNAL_TOKENS))
    except VllmMismatchError as error:
        return str(error)
    return ""


def _check_feature(feature: str) -> None:
    request, where = find(*REQUEST), ".".join(REQUEST)
    if name := FEATURE_PARAMETERS.get(feature):
        wanted = f"expected {where} with the parameter {name}"
        if name not in _signature(request, wanted).parameters:
            raise VllmMismatchError(f"{wanted}, found none")
    if (name := FEATURE_ATTRIBUTES.get(feature)) and not hasattr(request, name):
        raise VllmMismatchError(f"expected {where}.{name}, found no such name")
    for (module, record), fields in FEATURE_FIELDS.get(feature, {}).items():
        check_fields(find(module, record), fields, f"{module}.{record}")


def check_all() -> str:
    """Raise VllmMismatchError unless vLLM looks as expected; return its version."""
    for listed in (PLUGIN_LOADING, COMMAND_LINE, STAT_LOGGER):
        check(listed)
    check_when_named()
    return vllm_version()


def find(module: str, name: str) -> Any:
    """Return a module, or a name in it. Raises VllmMismatchError if that does not exist."""
    try:
        found = importlib.import_module(module)
    except Exception as error:
        raise VllmMismatchError(f"expected the module {module}, found {error!r}") from None
    if name and not hasattr(found, name):
        raise VllmMismatchError(f"expected {module}.{name}, found no such name")
    return getattr(found, name) if name else found


def check_callables(owner: Any, expected: Parameters, where: str) -> None:
    """Raise VllmMismatchError unless `owner`'s callables are understood."""
    for name, parameters in expected.items():
        wanted = f"expected {where}.{name}({', '.join(parameters)})"
        method = getattr(owner, name, None)
        if method is None:
            raise VllmMismatchError(f"{wanted}, found no such name")
        if not callable(method):
            raise VllmMismatchError(f"{wanted}, found a {type(method).__name__}")
        found = _signature(method, wanted)
        names = tuple(found.parameters)
        if names[: len(parameters)] != parameters or _needs_more(found, len(parameters)):
            raise VllmMismatchError(f"{wanted}, found {_shown(found)}")
        # A hook that does not await would take the coroutine for the result.
        if inspect.iscoroutinefunction(method) != name.endswith("_async"):
            kind = "async" if inspect.iscoroutinefunction(method) else "not async"
            raise VllmMismatchError(f"{wanted}, found it {kind}")


def _signature(method: Any, wanted: str) -> inspect.Signature:
    try:
        return inspect.signature(method)
    except (TypeError, ValueError):  # for example a compiled function
        raise VllmMismatchError(f"{wanted}, found one without a signature") from None


def _needs_more(signature: inspect.Signature, known: int) -> bool:
    """Return whether a call needs a parameter beyond the known ones."""
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(
        parameter.default is parameter.empty and parameter.kind not in optional
        for parameter in list(signature.parameters.values())[known:]
    )


def _shown(signature: inspect.Signature) -> str:
    """Return a signature without its types, which make the line long and say nothing here."""
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))


def check_fields(record: Any, expected: Iterable[str], where: str) -> None:
    """Raise VllmMismatchError unless a dataclass or msgspec struct has the fields expected."""
    if dataclasses.is_dataclass(record):
        found = tuple(field.name for field in dataclasses.fields(record))
    else:
        found = getattr(record, "__struct_fields__", ())
    missing = [name for name in expected if name not in found]
    if missing:
        raise VllmMismatchError(
            f"expected {where} with the fields {', '.join(missing)}, found {', '.join(found)}"
        )


def vllm_version() -> str:
    """Return vLLM's version as text for messages."""
    return str(getattr(vllm, "__version__", "of an unknown version"))
