"""Hooks on vLLM's output processor: note new engine requests, and take out arriving bills.

The hooks replace no vLLM code. docs/reference/hooks.md says what is hooked, and why there.

An engine request of an exchange whose budget is used up is refused here, before vLLM knows of it:
with an error of vLLM's own for its client, so that nothing has to be undone.

Invariant: with or without an error of ours, vLLM's call returns or raises what it would have, but
for that refusal.
"""

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, Protocol

from vllm_cost_meter.exchange import Birth, Exchange, Refusal, current_exchange
from vllm_cost_meter.records.bill import BILL_KEY, CARRIER_ID, Bill, read_bill
from vllm_cost_meter.units.time import NS_PER_SECOND
from vllm_cost_meter.vllm_hooks.kv_transfer import role_of_request


class Births(Protocol):
    """The receiver of new engine requests and their bills."""

    def refused(self, exchange: Exchange | None) -> Refusal | None:
        """Return the reply to an exchange that may have no further engine request, or None."""

    def born(self, birth: Birth) -> None:
        """Note an engine request that began in this process."""

    def billed(self, bill: Bill) -> None:
        """Note a bill that arrived."""


class Api(Protocol):
    """The meter's API side, which contains every error of the hooks."""

    def run(self, hook: str, body: Callable[..., Any], *args: Any) -> Any:
        """Call `body(births, *args)`. Never raises; None after an error."""


def hook_output_processor(collector: Callable[[], Api]) -> None:
    """Hook the start of engine requests and the arrival of bills in the API server.

    `collector` is called at each use, so that only a process that needs the API side makes it.
    """
    from vllm.v1.engine.output_processor import OutputProcessor  # heavy import

    add_request = OutputProcessor.add_request
    process_outputs = OutputProcessor.process_outputs
    if hasattr(add_request, "cost_meter_original"):
        return

    @functools.wraps(add_request)
    def metered_add_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        parent = args[1] if len(args) > 1 else kwargs.get("parent_req")
        index = args[2] if len(args) > 2 else kwargs.get("request_index", 0)
        refusal = collector().run("refuse", _refused, self, request, index)
        if refusal is not None:
            raise refusal
        result = add_request(self, request, *args, **kwargs)
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
            # Bill after vLLM's method, because that completes the request's statistics.
            for bill in bills or ():
                collector().run("bill", _billed, bill)

    metered_add_request.cost_meter_original = add_request  # type: ignore[attr-defined]
    OutputProcessor.add_request = metered_add_request
    OutputProcessor.process_outputs = metered_process_outputs


def _refused(collector: Births, processor: Any, request: Any, index: int) -> Exception | None:
    """Return the error with which a request is refused, None if it may be born."""
    if index > 0:
        # A choice (`n`) of a request whose first choice was born.
        return None
    if not getattr(request, "resumable", False):
        if request.request_id in processor.request_states:
            return None  # the end of an input that came in parts
        if any(feature.data is not None for feature in request.mm_features or ()):
            # New media: vLLM takes it that the engine has them from now on.
            return None
    refusal = collector.refused(current_exchange.get())
    return None if refusal is None else _client_error(refusal)


def _client_error(refusal: Refusal) -> Exception:
    """Return the error that vLLM answers its client with, and logs no trace of."""
    from vllm import exceptions  # heavy

    # With a status of its own since vLLM 0.30.
    with_status = getattr(exceptions, "GracefulHTTPError", None)
    if with_status is not None:
        return with_status(refusal.message, HTTPStatus(refusal.status))  # type: ignore[no-any-return]
    for name in ("VLLMClientError", "VLLMValidationError"):
        if (kind := getattr(exceptions, name, None)) is not None:
            return kind(refusal.message)  # type: ignore[no-any-return]
    return ValueError(refusal.message)


def _born(collector: Births, processor: Any, request: Any, parent: Any) -> None:
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
            kv_role=role_of_request(request),
        )
    )


def _take_bills(_collector: Births, outputs: list[Any]) -> list[str]:
    """Remove and return the bills in `outputs`, and remove outputs that carry nothing else."""
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


def _billed(collector: Births, bill: str) -> None:
    collector.billed(read_bill(bill))
