"""Hooks on vLLM's EngineCore: snapshot and stop calls, sleep, wake-up and dummy batches.

A spawned engine process loads the plugin inside `EngineCore.__init__`. So we can hook only methods
that vLLM looks up later, but not `__init__` itself.

Invariant: with or without an error of ours, vLLM's call returns or raises what it would have.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from vllm_cost_meter.engine.meter import EngineMeter, NoMeter


def hook_engine_core() -> None:
    """Hook sleep, wake-up and dummy batches of EngineCore, and add the snapshot and stop calls."""
    from vllm.v1.engine.core import EngineCore  # a heavy import, for engine and API processes

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
    """Utility call: return this engine's books now as plain values; None if it is not metered.

    Both arguments are by run. `acknowledged` has the number of the last snapshot that is committed.
    `earlier_fits` has the planes and the curve of an earlier fit, and whether planes were used.
    """
    meter = _meter_of(self)
    if isinstance(meter, NoMeter):
        return None
    if meter.run_id in earlier_fits:
        meter.run("adopt", _adopted, *earlier_fits[meter.run_id])
    scheduler = self.scheduler
    running, waiting = scheduler.get_request_counts()
    snapshot = meter.snapshot(
        acknowledged.get(meter.run_id, 0),
        known=scheduler.requests.keys(),
        running=running,
        waiting=waiting,
        kv_cache_usage=scheduler.kv_cache_manager.usage,
    )
    return snapshot.to_wire()


def _cost_meter_stop(self: Any, request_ids: list[str]) -> None:
    """Utility call: end these requests with their next token, as if they had asked for that.

    Requests that only wait end at once, where their client can be answered without a token.
    Unknown ids are ignored: they belong to another engine, or the request has ended meanwhile.
    """
    requests = self.scheduler.requests
    waiting: list[Any] = []
    for request_id in request_ids:
        request = requests.get(request_id)
        if request is None:
            continue
        request.max_tokens = min(request.max_tokens, max(request.num_output_tokens, 1))
        if _meter_of(self).run("stop", _can_end_unstarted, request):
            waiting.append(request)
    _end_unstarted(self, waiting)


def _can_end_unstarted(_meter: EngineMeter, _now_ns: int, request: Any) -> bool:
    """Tell whether a request waits, and its reply may be whole without a token.

    A stream needs a token to say its finish reason, log-probabilities are those of tokens, and an
    embedding has no tokens at all.
    """
    params = request.sampling_params
    return (
        params is not None
        and request.status.name == "WAITING"
        and not request.num_output_tokens
        and not getattr(request, "resumable", False)
        and params.output_kind.name == "FINAL_ONLY"
        and params.logprobs is None
        and params.prompt_logprobs is None
    )


def _end_unstarted(engine_core: Any, waiting: list[Any]) -> None:
    """End requests that wait with the finish reason `length`, and tell their API servers."""
    send = getattr(engine_core, "_send_finish_outputs_to_client", None)
    if not waiting or send is None:
        return  # an engine without API servers, or an older vLLM: each has its first token
    from vllm.v1.engine import FinishReason
    from vllm.v1.request import RequestStatus

    by_client: dict[int, list[str]] = {}
    for request in waiting:
        by_client.setdefault(request.client_index, []).append(request.request_id)
    for client_index, request_ids in by_client.items():
        # The clients first: whatever fails after that, none of them waits for ever.
        send(request_ids, client_index, FinishReason.LENGTH)
        engine_core.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_LENGTH_CAPPED)


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


def _adopted(
    meter: EngineMeter, _now_ns: int, planes: Any, coefficients: Any, two_planes: bool
) -> None:
    meter.adopt(planes, coefficients, two_planes)


def _slept(meter: EngineMeter, now_ns: int) -> None:
    meter.fall_asleep(now_ns)


def _woke(meter: EngineMeter, now_ns: int) -> None:
    meter.wake_up(now_ns)


def _dummy_began(meter: EngineMeter, now_ns: int) -> None:
    meter.begin_dummy(now_ns)


def _dummy_ended(meter: EngineMeter, now_ns: int) -> None:
    meter.end_dummy(now_ns)
