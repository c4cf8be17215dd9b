"""Hooks on vLLM's scheduler, where each engine step is measured.

docs/reference/hooks.md says what is hooked, and why there. The hooks replace no vLLM code: each
calls the original method with the same arguments and returns its result. A hook that is installed
twice has no further effect. A vLLM that does not look as expected is left untouched (`canary.py`).

Invariant: with or without an error of ours, vLLM's call returns or raises what it would have.
"""

import functools
from collections.abc import Mapping
from typing import Any

from vllm_cost_meter.engine.books import RequestFacts
from vllm_cost_meter.engine.meter import EngineMeter, NoMeter
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.bill import BILL_KEY, CARRIER_ID, write_bill
from vllm_cost_meter.vllm_hooks import canary
from vllm_cost_meter.vllm_hooks.features import FeatureReader
from vllm_cost_meter.vllm_hooks.identity import make_engine_meter
from vllm_cost_meter.vllm_hooks.kv_transfer import ExternalTokens

logger = meter_logger()

# -- engine side ------------------------------------------------------------------------------


class MeteredScheduler:
    """A mixin that meters the scheduler class behind it, which vLLM or the operator chose."""

    cost_meter: EngineMeter | NoMeter = NoMeter()
    cost_meter_features: FeatureReader
    cost_meter_external: ExternalTokens

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        try:
            self.cost_meter_features = FeatureReader()
            self.cost_meter_external = ExternalTokens(self)
            self.cost_meter = make_engine_meter(self)
        except Exception as error:
            logger.exception("cost meter: the engine runs unmetered: %r", error)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        self.cost_meter.run("schedule", _scheduled, output, self)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        meter = self.cost_meter
        meter.run("update_from_output", _result_came, self, scheduler_output, args, kwargs)
        meter.riding = True
        try:
            outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        finally:
            meter.riding = False
        if meter.late:
            meter.run("late bills", _carry_late_bills, outputs)
        return outputs

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.cost_meter.run("add_request", _added, request, self)
        return super().add_request(request, *args, **kwargs)  # type: ignore[misc]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        self.cost_meter.run("_free_request", _freed, request)
        return result


def _scheduled(meter: EngineMeter, now_ns: int, output: Any, scheduler: Any) -> None:
    for request_id in output.preempted_req_ids or ():
        meter.preempt(request_id, now_ns)
    if not output.total_num_scheduled_tokens:
        return  # Such a step takes no device time.
    tokens = output.num_scheduled_tokens
    others = {}
    for new in output.scheduled_new_reqs:
        computed_tokens = new.num_computed_tokens
        external_tokens = scheduler.cost_meter_external.of_first_step(
            scheduler, new.req_id, computed_tokens
        )
        meter.placed(new.req_id, computed_tokens, external_tokens)
        others[new.req_id] = tokens[new.req_id]
    cached = output.scheduled_cached_reqs
    if cached.resumed_req_ids:
        for request_id, computed_tokens in zip(
            cached.req_ids, cached.num_computed_tokens, strict=True
        ):
            if request_id in cached.resumed_req_ids:
                # Only of a request's first step is known what it began with.
                meter.placed(request_id, computed_tokens, None)
    encoded = scheduler.cost_meter_features.encoded(output, scheduler)
    decoding = cached.req_ids
    one_token_each = output.total_num_scheduled_tokens - sum(others.values()) == len(decoding)
    if one_token_each and len(tokens) == len(others) + len(decoding):
        meter.begin_step(output, others, now_ns, decoding, encoded)
    else:
        meter.begin_step(output, tokens, now_ns, None, encoded)


def _result_came(
    meter: EngineMeter, now_ns: int, scheduler: Any, scheduler_output: Any, args: Any, kwargs: Any
) -> None:
    drafts = scheduler_output.scheduled_spec_decode_tokens
    if not drafts:
        meter.result_came(scheduler_output, None, now_ns)
        return
    model_output = args[0] if args else kwargs["model_runner_output"]
    rejected, outputs_uncut = _results_of_drafts(drafts, model_output, scheduler.requests)
    meter.result_came(scheduler_output, rejected, now_ns, outputs_uncut)


def _results_of_drafts(
    drafts: Mapping[str, Any], model_output: Any, requests: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return two counts by request with drafts: rejected draft tokens, and uncut output length.

    The uncut length is the output's length if all sampled tokens go into it. vLLM cuts off the
    tokens behind the end of the request. The output's real length, when the request is freed, shows
    how many were cut.
    """
    rejected, outputs_uncut = {}, {}
    for request_id, draft in drafts.items():
        place = model_output.req_id_to_index.get(request_id)
        sampled = model_output.sampled_token_ids[place] if place is not None else ()
        # The sampled tokens are the accepted part of the draft and one token more. Without any, a
        # prefill goes on or the request was aborted meanwhile.
        if len(sampled):
            rejected[request_id] = max(len(draft) + 1 - len(sampled), 0)
            if (request := requests.get(request_id)) is not None:
                outputs_uncut[request_id] = request.num_output_tokens + len(sampled)
    return rejected, outputs_uncut


def _added(meter: EngineMeter, now_ns: int, request: Any, scheduler: Any) -> None:
    has_lora, is_guided = scheduler.cost_meter_features.of_request(request)
    meter.open(request.request_id, request.num_prompt_tokens, now_ns, has_lora, is_guided)


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
        # vLLM copies the headers into the request's last output, which is built after this. We
        # make a new mapping, because the old one may be shared.
        request.trace_headers = {**(request.trace_headers or {}), BILL_KEY: write_bill(bill)}


def _carry_late_bills(meter: EngineMeter, _now_ns: int, outputs: dict[int, Any]) -> None:
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs  # The canary has checked both.

    for client_index, bill in meter.take_late():
        carrier = EngineCoreOutput(CARRIER_ID, [], trace_headers={BILL_KEY: write_bill(bill)})
        outputs.setdefault(client_index, EngineCoreOutputs()).outputs.append(carrier)


def meter_scheduler_class(scheduler_class: type) -> type:
    """Return a metered subclass of a scheduler class, or the same class if it is not understood."""
    try:
        if issubclass(scheduler_class, MeteredScheduler):
            return scheduler_class
        where = f"{scheduler_class.__module__}.{scheduler_class.__qualname__}"
        canary.check_callables(scheduler_class, canary.SCHEDULER, where)
        return type(f"Metered{scheduler_class.__name__}", (MeteredScheduler, scheduler_class), {})
    except Exception as error:  # noqa: BLE001 - a custom scheduler class may raise anything
        logger.error("cost meter: the engine runs unmetered: %s. %s", error, canary.WHAT_TO_DO)
        return scheduler_class


def hook_scheduler_choice() -> None:
    """Make SchedulerConfig.get_scheduler_cls return metered classes."""
    from vllm.config import SchedulerConfig  # The canary has checked it.

    original = SchedulerConfig.get_scheduler_cls
    if hasattr(original, "cost_meter_original"):
        return

    @functools.wraps(original)
    def get_scheduler_cls(self: SchedulerConfig, *args: Any, **kwargs: Any) -> type:
        return meter_scheduler_class(original(self, *args, **kwargs))

    get_scheduler_cls.cost_meter_original = original  # type: ignore[attr-defined]
    SchedulerConfig.get_scheduler_cls = get_scheduler_cls
