"""vLLM's internals in the engine's process, on the command line and where plugins are loaded.

Only modules named `_vllm*` touch vLLM's internals; the API server's side is `_vllm_api.py`.

What is hooked, and why there, is in docs/reference/hooks.md. No body of vLLM is replaced: each hook
calls the original with the arguments that came and hands on what it returned. Hooks are idempotent.
A vLLM that does not look as expected is left untouched (`_vllm_canary.py`).

Invariant: with or without an error of ours, vLLM's call returns or raises what it would have.
"""

import argparse
import functools
import logging
import platform
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import vllm.plugins

from vllm_cost_meter import _vllm_canary as canary
from vllm_cost_meter.books import RequestFacts
from vllm_cost_meter.config import load_settings
from vllm_cost_meter.energy import EnergyCounter
from vllm_cost_meter.engine import EngineIdentity, EngineMeter, NoMeter
from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.records import BILL_KEY, CARRIER_ID
from vllm_cost_meter.wire import write_bill

logger = logging.getLogger("vllm.cost_meter")

STAT_LOGGER_PLUGINS = "vllm.stat_logger_plugins"

# -- engine side ------------------------------------------------------------------------------


class MeteredScheduler:
    """Mixed in front of whatever scheduler class vLLM chose."""

    cost_meter: EngineMeter | NoMeter = NoMeter()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self.cost_meter = make_engine_meter(self)
        except Exception as error:
            logger.exception("cost meter: the engine runs unmetered: %r", error)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.cost_meter.run("schedule", _scheduled, output)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        meter = self.cost_meter
        meter.run("update_from_output", _result_came, scheduler_output, args, kwargs)
        meter.riding = True
        try:
            outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            meter.riding = False
        if meter.late:
            meter.run("late bills", _carry_late_bills, outputs)
        return outputs

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.cost_meter.run("add_request", _added, request)
        return super().add_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        self.cost_meter.run("_free_request", _freed, request)
        return result


def make_engine_meter(scheduler: Any) -> EngineMeter:
    """Make the meter of one engine from its scheduler's configuration."""
    from vllm.version import __version__ as vllm_version  # noqa: PLC0415 - not in old workers

    from vllm_cost_meter._vllm_counts import prior_of_model  # noqa: PLC0415 - engine only

    config = scheduler.vllm_config
    parallel = config.parallel_config
    engine = EngineIdentity(
        model=model_name(config),
        engine_index=getattr(parallel, "data_parallel_index", parallel.data_parallel_rank),
        vllm_version=vllm_version,
        hardware=device_name(),
        parallelism=f"tp={parallel.tensor_parallel_size} pp={parallel.pipeline_parallel_size}"
        f" dp={parallel.data_parallel_size}",
        kv_blocks=scheduler.kv_cache_config.num_blocks or None,
        kv_block_size=scheduler.block_size or None,
        host=host_name() or "unknown",
        precision=precision_of(config),
    )
    settings = load_settings()
    meter = EngineMeter(
        method=settings.method,
        gpus=parallel.world_size,
        engine=engine,
        prior=prior_of_model(config, engine.hardware),
        step_log=Path(settings.step_log) if settings.step_log else None,
        energy=_energy_counter(parallel),
    )
    logger.info(
        "cost meter: engine %d is metered (%s, %d GPU, method %s, run %s)",
        engine.engine_index,
        type(scheduler).__name__.removeprefix("Metered"),
        meter.books.gpus,
        meter.books.method,
        meter.books.run_id,
    )
    return meter


def _energy_counter(parallel: Any) -> EnergyCounter:
    """Make the counter of the engine's own GPUs. Never raises: without one, the rest goes on."""
    try:
        from vllm_cost_meter import _vllm_devices  # noqa: PLC0415 - engine only

        ordinals, why_none = _vllm_devices.gpu_ordinals(parallel)
    except Exception as error:  # noqa: BLE001 - metering may fail, serving may not
        ordinals, why_none = [], f"which GPUs are the engine's cannot be told: {error!r}"
    return EnergyCounter(ordinals, why_none=why_none)


def host_name() -> str:
    """Return the name of this machine, empty where it has none."""
    return platform.node()


def device_name() -> str:
    """Return the name of the GPU, or of the CPU where vLLM runs on that."""
    from vllm.platforms import current_platform  # noqa: PLC0415 - engines and API servers only

    if current_platform.is_cpu():
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        return names[0] if names else platform.machine()
    return str(current_platform.get_device_name())


def _scheduled(meter: EngineMeter, now_ns: int, output: Any) -> None:
    for request_id in output.preempted_req_ids or ():
        meter.books.preempt(request_id, now_ns)
    if not output.total_num_scheduled_tokens:
        return  # takes no device time
    tokens = output.num_scheduled_tokens
    others = {}
    for new in output.scheduled_new_reqs:
        meter.placed(new.req_id, new.num_computed_tokens)
        others[new.req_id] = tokens[new.req_id]
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        for request_id, computed_tokens in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                meter.placed(request_id, computed_tokens)
    decoding = cached.req_ids
    one_token_each = output.total_num_scheduled_tokens - sum(others.values()) == len(decoding)
    if one_token_each and len(tokens) == len(others) + len(decoding):
        meter.books.begin_step(output, others, now_ns, decoding)
    else:
        meter.books.begin_step(output, tokens, now_ns)


def _result_came(
    meter: EngineMeter, now_ns: int, scheduler_output: Any, args: Any, kwargs: Any
) -> None:
    rejected = None
    drafts = scheduler_output.scheduled_spec_decode_tokens
    if drafts:
        model_output = args[0] if args else kwargs["model_runner_output"]
        rejected = _rejected_drafts(drafts, model_output)
    meter.result_came(scheduler_output, rejected, now_ns)


def _rejected_drafts(drafts: Mapping[str, Any], model_output: Any) -> dict[str, int]:
    """Return of how many tokens of each request's draft nothing came."""
    rejected = {}
    for request_id, draft in drafts.items():
        place = model_output.req_id_to_index.get(request_id)
        sampled = model_output.sampled_token_ids[place] if place is not None else ()
        # What was sampled is the accepted part of the draft and one token more; nothing at all is
        # of a prefill that goes on, or of a request that was aborted meanwhile.
        if len(sampled):
            rejected[request_id] = max(len(draft) + 1 - len(sampled), 0)
    return rejected


def _added(meter: EngineMeter, now_ns: int, request: Any) -> None:
    meter.books.open(request.request_id, request.num_prompt_tokens, now_ns)


def _freed(meter: EngineMeter, now_ns: int, request: Any) -> None:
    facts = RequestFacts(
        engine_status=request.status.name.removeprefix("FINISHED_").lower(),
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=0,
        output_tokens=request.num_output_tokens,
        preemptions=request.num_preemptions,
    )
    bill = meter.ended(request.request_id, request.client_index, facts, now_ns)
    if bill is not None:
        # Echoed in the request's last output, which is built after this; never mutated in place,
        # as the mapping may be shared.
        request.trace_headers = {**(request.trace_headers or {}), BILL_KEY: write_bill(bill)}


def _carry_late_bills(meter: EngineMeter, _now_ns: int, outputs: dict[int, Any]) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs  # noqa: PLC0415 - see canary

    for client_index, bill in meter.take_late():
        carrier = EngineCoreOutput(CARRIER_ID, [], trace_headers={BILL_KEY: write_bill(bill)})
        outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(carrier)


def meter_scheduler_class(scheduler_class: type) -> type:
    """Return a metered subclass of a scheduler class; of one not understood, the class itself."""
    try:
        if issubclass(scheduler_class, MeteredScheduler):
            return scheduler_class
        where = f"{scheduler_class.__module__}.{scheduler_class.__qualname__}"
        canary.check_callables(scheduler_class, canary.SCHEDULER, where)
        return type(f"Metered{scheduler_class.__name__}", (MeteredScheduler, scheduler_class), {})
    except Exception as error:  # noqa: BLE001 - of a class that somebody else chose
        logger.error("cost meter: the engine runs unmetered: %s. %s", error, canary.WHAT_TO_DO)
        return scheduler_class


def hook_scheduler_choice() -> None:
    """Make SchedulerConfig.get_scheduler_cls return metered classes."""
    from vllm.config import SchedulerConfig  # noqa: PLC0415 - see canary

    original = SchedulerConfig.get_scheduler_cls
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def get_scheduler_cls(self: SchedulerConfig, *args: Any, **kwargs: Any) -> type:
        return meter_scheduler_class(original(self, *args, **kwargs))

    get_scheduler_cls.cost_meter_original = original  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def hook_engine_core() -> None:
    """Meter sleep, wake-up and dummy batches, and add the snapshot call, on class EngineCore.

    In a spawned engine process the plugin is loaded inside EngineCore.__init__, so only what is
    looked up later can be hooked.
    """
    from vllm.v1.engine.core import EngineCore  # noqa: PLC0415 - heavy; engine and API processes

    if hasattr(EngineCore, "cost_meter_snapshot"):
        return
    EngineCore.cost_meter_snapshot = _cost_meter_snapshot
    EngineCore.cost_meter_stop = _cost_meter_stop
    for name, wrap in (
        ("sleep", _wrap_sleep),
        ("wake_up", _wrap_wake_up),
        ("execute_dummy_batch", _wrap_dummy_batch),
    ):
        setattr(EngineCore, name, wrap(getattr(EngineCore, name)))


def _meter_of(engine_core: Any) -> EngineMeter | NoMeter:
    meter: EngineMeter | NoMeter = getattr(engine_core.scheduler, "cost_meter", NoMeter())
    return meter


def _cost_meter_snapshot(
    self: Any, acknowledged: dict[str, int], earlier_fits: dict[str, Any]
) -> dict[str, Any] | None:
    """Utility call: this engine's books now, as plain values; None if it is not metered.

    By run: `acknowledged` has the number of the last snapshot that is safe, `earlier_fits` the
    planes of an earlier fit and whether both were used.
    """
    meter = _meter_of(self)
    if isinstance(meter, NoMeter):
        return None
    if meter.books.run_id in earlier_fits:
        meter.run("adopt", _adopted, *earlier_fits[meter.books.run_id])
    scheduler = self.scheduler
    running, waiting = scheduler.get_request_counts()
    snapshot = meter.snapshot(
        acknowledged.get(meter.books.run_id, 0),
        known=scheduler.requests.keys(),
        running=running,
        waiting=waiting,
        kv_cache_usage=scheduler.kv_cache_manager.usage,
    )
    return snapshot.to_wire()


def _cost_meter_stop(self: Any, request_ids: list[str]) -> None:
    """Utility call: let these requests end with their next token, as if they had asked for that.

    Ids that this engine does not know are none of its business, or have ended meanwhile.
    """
    requests = self.scheduler.requests
    for request_id in request_ids:
        request = requests.get(request_id)
        if request is not None:
            request.max_tokens = min(request.max_tokens, max(request.num_output_tokens, 1))


def _wrap_sleep(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sleep(self: Any, *args: Any, **kwargs: Any) -> Any:
        def fell_asleep(_future: object = None) -> None:
            _meter_of(self).run("sleep", _slept)

        result = original(self, *args, **kwargs)
        if isinstance(result, Future):
            result.add_done_callback(fell_asleep)
        else:
            fell_asleep()
        return result

    return sleep


def _wrap_wake_up(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def wake_up(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if not self.is_sleeping():
            _meter_of(self).run("wake_up", _woke)
        return result

    return wake_up


def _wrap_dummy_batch(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def execute_dummy_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        meter = _meter_of(self)
        meter.run("execute_dummy_batch", _dummy_began)
        result = original(self, *args, **kwargs)
        meter.run("execute_dummy_batch", _dummy_ended)
        return result

    return execute_dummy_batch


def _adopted(meter: EngineMeter, _now_ns: int, planes: Any, two_planes: bool) -> None:
    meter.books.adopt(planes, two_planes)


def _slept(meter: EngineMeter, now_ns: int) -> None:
    meter.books.fall_asleep(now_ns)


def _woke(meter: EngineMeter, now_ns: int) -> None:
    meter.books.wake_up(now_ns)


def _dummy_began(meter: EngineMeter, now_ns: int) -> None:
    meter.books.begin_dummy(now_ns)


def _dummy_ended(meter: EngineMeter, now_ns: int) -> None:
    meter.books.end_dummy(now_ns)


def precision_of(vllm_config: Any) -> str:
    """Return what an engine computes in: its data type, and quantization of weights and cache."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    # It is told and nothing depends on it, so an engine is metered without it too.
    parts = [str(getattr(model, "dtype", "unknown")).removeprefix("torch.")]
    if quantization := getattr(model, "quantization", None):
        parts.append(f"{quantization} weights")
    if (cache_dtype := getattr(cache, "cache_dtype", "auto")) != "auto":
        parts.append(f"{cache_dtype} KV cache")
    return ", ".join(parts)


def model_name(vllm_config: Any) -> str:
    """Return the (first) served model name of a vLLM configuration."""
    name = vllm_config.model_config.served_model_name
    return str(name[0] if isinstance(name, list) else name)


# -- command line and plugin loading ------------------------------------------------------------


def hook_cli_flags(add_flags: Callable[[argparse.ArgumentParser], None]) -> None:
    """Call `add_flags(parser)` whenever vLLM fills an argument parser with engine arguments."""
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415 - it imports us back

    original = EngineArgs.add_cli_args
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def add_cli_args(parser: Any, *args: Any, **kwargs: Any) -> Any:
        filled = original(parser, *args, **kwargs)
        try:
            add_flags(filled)
        except Exception:
            logger.exception("cost meter: without its flags; VLLM_PLUGINS can name it")
        return filled

    add_cli_args.cost_meter_original = original  # type: ignore[attr-defined]
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def hook_stat_logger_loading(is_active: Callable[[], bool], plugin_name: str) -> None:
    """Keep vLLM from using our stat logger while the meter is not active.

    Its mere presence would turn statistics on under --disable-log-stats.
    """
    original = vllm.plugins.load_plugins_by_group
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def load_plugins_by_group(group: str, *args: Any, **kwargs: Any) -> Any:
        plugins = original(group, *args, **kwargs)
        if group == STAT_LOGGER_PLUGINS and not (is_active() and _stat_logger_fits()):
            plugins.pop(plugin_name, None)
        return plugins

    load_plugins_by_group.cost_meter_original = original  # type: ignore[attr-defined]
    vllm.plugins.load_plugins_by_group = load_plugins_by_group
    # It may already hold the original under its own name; importing it here would be heavy.
    if loggers := sys.modules.get("vllm.v1.metrics.loggers"):
        loggers.load_plugins_by_group = load_plugins_by_group  # type: ignore[attr-defined]


def _stat_logger_fits() -> bool:
    """Tell whether vLLM will call our stat logger as it expects: an error in it stops vLLM."""
    try:
        canary.check(canary.STAT_LOGGER)
    except VllmMismatchError as error:
        logger.error("cost meter: without latency metrics, all else is metered: %s", error)
        return False
    return True
