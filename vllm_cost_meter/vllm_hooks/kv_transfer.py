"""Read from vLLM what a KV connector brought, and which half of a request a server has.

Where prefill and decode have servers of their own, or where a cache is kept outside the engine, a
KV connector brings the start of a prompt. vLLM's scheduler counts those tokens as computed, as it
does tokens of the engine's own prefix cache; `PrefillStats` of a request has both apart. A router
that splits a request tells each server its half (`kv_transfer_params`), or each server is
configured for one (`kv_role`).

The steps of a request are billed right without these facts. So a vLLM that tells one of them in
another way is metered all the same, and the fact is unknown.

Invariant: nothing here raises, and of each fact that cannot be read there is one warning.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.requests import KV_CONSUMER, KV_PRODUCER
from vllm_cost_meter.vllm_hooks import canary

logger = meter_logger()

_UNTOLD = object()
# What a router tells each server of a request, by vLLM's names.
_PARAMS, _SENDS, _RECEIVES = "kv_transfer_params", "do_remote_decode", "do_remote_prefill"


class ExternalTokens:
    """Reads the tokens that came over one engine's KV connector."""

    def __init__(self, scheduler: Any) -> None:
        """Look once whether the engine has a connector, and whether this vLLM counts its tokens."""
        self._is_used = getattr(scheduler, "connector", _UNTOLD) is not None
        self._is_readable = True
        if self._is_used and (why := canary.missing_external_tokens()):
            self._give_up(why)

    def of_first_step(self, scheduler: Any, request_id: str, computed_tokens: int) -> int | None:
        """Return how many of the tokens that a new request begins with came over the connector.

        `computed_tokens` are all that it begins with. Returns None if that is unknown. Where a
        transfer failed halfway, only the tokens that came are among `computed_tokens`. vLLM still
        counts the whole transfer, so what is not of the engine's own cache is the measure.
        """
        if not computed_tokens or not self._is_used:
            return 0
        if not self._is_readable:
            return None
        try:
            stats = scheduler.requests[request_id].prefill_stats
            if stats is None:  # It had its first output before: this is not its first step.
                return None
            local_tokens = int(stats.num_local_cached_tokens)
            if local_tokens < 0:
                raise ValueError(f"expected 0 or more tokens, got {local_tokens}")
        except Exception as error:  # noqa: BLE001 - vLLM's objects may have any shape
            self._give_up(repr(error))
            return None
        return max(computed_tokens - local_tokens, 0)

    def _give_up(self, why: str) -> None:
        self._is_readable = False
        logger.warning(
            "cost meter: how many tokens come over the KV connector is unknown, because vLLM does"
            " not count them as expected: %s",
            why,
        )


def role_of_request(request: Any) -> str | None:
    """Return which half of a request this is, of an engine request in vLLM's frontend.

    `KV_PRODUCER` computes the prompt for another server, `KV_CONSUMER` goes on from there. None if
    its router does not say.
    """
    try:
        sampling = request.sampling_params
        params = None if sampling is None else (sampling.extra_args or {}).get(_PARAMS)
    except Exception as error:  # noqa: BLE001 - vLLM's objects may have any shape
        _warn_of_roles(repr(error))
        return None
    told = params if isinstance(params, Mapping) else {}
    sends, receives = bool(told.get(_SENDS)), bool(told.get(_RECEIVES))
    if sends == receives:
        return None
    return KV_PRODUCER if sends else KV_CONSUMER


def role_of_server(vllm_config: Any) -> str | None:
    """Return the half of requests that a server is configured for; None if it may have both."""
    config = getattr(vllm_config, "kv_transfer_config", None)
    role = getattr(config, "kv_role", None)
    return role if role in (KV_PRODUCER, KV_CONSUMER) else None


@cache
def _warn_of_roles(why: str) -> None:
    logger.warning(
        "cost meter: which half of a request a prefill or decode server has is unknown, because"
        " vLLM does not tell it as expected: %s",
        why,
    )
