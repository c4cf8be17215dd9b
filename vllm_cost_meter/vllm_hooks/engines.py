"""Calls from an API server to its engines: poll their books, stop requests, read their facts.

Invariant: an engine that does not answer, or answers with an error, spoils no other's result.
"""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vllm_cost_meter.config.engine import with_pod_labels
from vllm_cost_meter.prices.book import RunFacts, label_pairs
from vllm_cost_meter.records.snapshot import EarlierFit, Snapshot
from vllm_cost_meter.vllm_hooks.identity import device_name, host_name, model_name
from vllm_cost_meter.vllm_hooks.kv_transfer import role_of_server

if TYPE_CHECKING:
    # A real import would bring the ledger into the engine's process.
    pass


async def poll_engines(
    engine_client: Any,
    acknowledged: Mapping[str, int],
    earlier_fits: Mapping[str, EarlierFit],
    timeout_s: float,
) -> list[Snapshot | BaseException | None]:
    """Ask every engine for its books. Return one result per engine: a snapshot, error or None.

    An engine that has not answered after `timeout_s` gives a TimeoutError. Each engine gets its own
    call, because with data parallelism vLLM's own call returns only the first engine's answer.
    """
    core = engine_client.engine_core

    async def ask(engine: bytes) -> Snapshot | None:
        fits = {
            run_id: (fit.planes, fit.coefficients, fit.two_planes)
            for run_id, fit in earlier_fits.items()
        }
        call = core._call_utility_async(
            "cost_meter_snapshot", dict(acknowledged), fits, engine=engine
        )
        answer = await asyncio.wait_for(call, timeout_s)
        return None if answer is None else Snapshot.from_wire(answer)

    return await asyncio.gather(*map(ask, core.core_engines), return_exceptions=True)


async def stop_requests(engine_client: Any, request_ids: Sequence[str], timeout_s: float) -> None:
    """End requests with their next token. Raises TimeoutError if an engine does not answer."""
    core = engine_client.engine_core
    calls = [
        core._call_utility_async("cost_meter_stop", list(request_ids), engine=engine)
        for engine in core.core_engines
    ]
    await asyncio.wait_for(asyncio.gather(*calls), timeout_s)


def api_server_index(engine_client: Any) -> int:
    """Return the index of this process among the API servers; 0 if there is only one."""
    return int(getattr(engine_client.engine_core, "client_index", 0))


def served_names(engine_client: Any, state: Any) -> list[str]:
    """Return all names under which the model is served.

    The application's state has all names. The engine's configuration has only the first.
    """
    models = getattr(state, "openai_serving_models", None)
    names = [str(path.name) for path in getattr(models, "base_model_paths", ())]
    return names or [model_name(engine_client.vllm_config)]


def run_facts(engine_client: Any, declared_labels: Mapping[str, str]) -> RunFacts:
    """Return the facts that an API server knows about its engines without asking them.

    `declared_labels` are those of the settings.

    With these facts every API server can price every bill, though only the first one sees
    snapshots. A fact that may differ between the engines, or is unknown here, is None.
    """
    config = engine_client.vllm_config
    try:
        gpu_name = device_name() or None
    except Exception:  # noqa: BLE001 - an API server may run where there is no GPU
        gpu_name = None
    is_here = _engines_are_here(config.parallel_config)
    return RunFacts(
        gpus=config.parallel_config.world_size,
        model=model_name(config),
        gpu_name=gpu_name,
        host=(host_name() or None) if is_here else None,
        # Engines of this machine have this process's environment.
        labels=label_pairs(with_pod_labels(declared_labels, os.environ)) if is_here else None,
    )


def kv_role(engine_client: Any) -> str | None:
    """Return the half of requests that an API server's engines are configured for, if any."""
    return role_of_server(engine_client.vllm_config)


def _engines_are_here(parallel_config: Any) -> bool:
    """Return whether all engines of this API server run on its own machine."""
    if getattr(parallel_config, "local_engines_only", False):
        return True
    engines = int(getattr(parallel_config, "data_parallel_size", 1))
    return int(getattr(parallel_config, "data_parallel_size_local", engines)) == engines
