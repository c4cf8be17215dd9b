"""vLLM's internals on the API server's side: births of requests, arriving bills, asking engines.

As in `_vllm.py`, no body of vLLM is replaced. docs/reference/hooks.md says what is
hooked, and why there.

Invariant: with or without an error of ours, vLLM's call returns or raises what it would have.
"""

import asyncio
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_cost_meter._vllm import device_name, host_name, model_name
from vllm_cost_meter.exchange import Birth, current_exchange
from vllm_cost_meter.price_book import RunFacts
from vllm_cost_meter.records import (
    BILL_KEY,
    CARRIER_ID,
    NS_PER_SECOND,
    EarlierFit,
    Snapshot,
)
from vllm_cost_meter.wire import read_bill

if TYPE_CHECKING:
    # At run time it would bring the ledger into the engine's process.
    from vllm_cost_meter.collector import Collector


def hook_output_processor(collector: Callable[[], "Collector"]) -> None:
    """Hook the birth of engine requests and the arrival of bills in the API server.

    `collector` is called at each use, so that the API side is made only in the process that needs
    it.
    """
    from vllm.v1.engine.output_processor import OutputProcessor  # noqa: PLC0415 - heavy

    add_request = OutputProcessor.add_request
    process_outputs = OutputProcessor.process_outputs
    if hasattr(add_request, "cost_meter_original"):
        return

    @functools.wraps(add_request)
    def metered_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = add_request(self, request, *args, **kwargs)
        parent = args[1] if len(args) > 1 else kwargs.get("parent_req")
        collector().run("add_request", _born, self, request, parent)
        return result

    @functools.wraps(process_outputs)
    def metered_process_outputs(
        self: Any, engine_core_outputs: list[Any], *args: Any, **kwargs: Any
    ) -> Any:
        bills = collector().run("process_outputs", _take_bills, engine_core_outputs)
        try:
            return process_outputs(self, engine_core_outputs, *args, **kwargs)
        finally:
            # After the original, which completes the request's own statistics.
            for bill in bills or ():
                collector().run("bill", _billed, bill)

    metered_add_request.cost_meter_original = add_request  # type: ignore[attr-defined]
    OutputProcessor.add_request = metered_add_request
    OutputProcessor.process_outputs = metered_process_outputs


def _born(collector: "Collector", processor: Any, request: Any, parent: Any) -> None:
    state = processor.request_states.get(request.request_id)
    lora = request.lora_request
    collector.born(
        Birth(
            request_id=request.request_id,
            external_id=request.external_req_id,
            prompt_group=parent.request_id if parent is not None else request.request_id,
            lora=lora.lora_name if lora is not None else None,
            arrived_at_ns=int(request.arrival_time * NS_PER_SECOND),
            exchange=current_exchange.get(),
            times=state.stats if state is not None else None,
        )
    )


def _take_bills(_collector: "Collector", outputs: list[Any]) -> list[str]:
    """Take the bills out of a list of outputs, and the outputs that carry nothing else."""
    bills: list[str] = []
    late = False
    for output in outputs:
        headers = output.trace_headers
        if headers is not None and BILL_KEY in headers:
            bills.append(headers[BILL_KEY])
            output.trace_headers = {k: v for k, v in headers.items() if k != BILL_KEY} or None
            late = late or output.request_id == CARRIER_ID
    if late:
        outputs[:] = [output for output in outputs if output.request_id != CARRIER_ID]
    return bills


def _billed(collector: "Collector", bill: str) -> None:
    collector.billed(read_bill(bill))


async def poll_engines(
    engine_client: Any,
    acknowledged: Mapping[str, int],
    earlier_fits: Mapping[str, EarlierFit],
    timeout_s: float,
) -> list[Snapshot | BaseException | None]:
    """Ask every engine for its books. One result per engine: an error or None is that engine's.

    An engine that has not answered after `timeout_s` has a TimeoutError. One call per engine,
    because with data parallelism vLLM's own call returns only the first engine's answer.
    """
    core = engine_client.engine_core

    async def ask(engine: bytes) -> Snapshot | None:
        fits = {run_id: (fit.planes, fit.two_planes) for run_id, fit in earlier_fits.items()}
        call = core._call_utility_async(
            "cost_meter_snapshot", dict(acknowledged), fits, engine=engine
        )
        answer = await asyncio.wait_for(call, timeout_s)
        return None if answer is None else Snapshot.from_wire(answer)

    return await asyncio.gather(*map(ask, core.core_engines), return_exceptions=True)


async def stop_requests(engine_client: Any, request_ids: Sequence[str], timeout_s: float) -> None:
    """Have requests end with their next token. Raises TimeoutError if no engine answers."""
    core = engine_client.engine_core
    calls = [
        core._call_utility_async("cost_meter_stop", list(request_ids), engine=engine)
        for engine in core.core_engines
    ]
    await asyncio.wait_for(asyncio.gather(*calls), timeout_s)


def api_server_index(engine_client: Any) -> int:
    """Return which of several API servers this process is; 0 where there is one."""
    return int(getattr(engine_client.engine_core, "client_index", 0))


def served_names(engine_client: Any, state: Any) -> list[str]:
    """Return all names under which the model is served.

    The engine knows the first only, the application's state all of them.
    """
    models = getattr(state, "openai_serving_models", None)
    names = [str(path.name) for path in getattr(models, "base_model_paths", ())]
    return names or [model_name(engine_client.vllm_config)]


def run_facts(engine_client: Any) -> RunFacts:
    """Return what of its engines this API server knows by itself: one answer for all of them.

    So that every API server can price every bill, though only the first one sees snapshots. What
    may differ between its engines, or cannot be told here, is None.
    """
    config = engine_client.vllm_config
    try:
        gpu_name = device_name() or None
    except Exception:  # noqa: BLE001 - an API server may run where there is no GPU
        gpu_name = None
    return RunFacts(
        gpus=config.parallel_config.world_size,
        model=model_name(config),
        gpu_name=gpu_name,
        host=(host_name() or None) if _engines_are_here(config.parallel_config) else None,
    )


def _engines_are_here(parallel_config: Any) -> bool:
    """Tell whether all engines of this API server run on its own machine."""
    if getattr(parallel_config, "local_engines_only", False):
        return True
    engines = int(getattr(parallel_config, "data_parallel_size", 1))
    return int(getattr(parallel_config, "data_parallel_size_local", engines)) == engines
