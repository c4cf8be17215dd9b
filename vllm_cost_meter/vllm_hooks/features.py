"""Read from vLLM which requests need more than the model: LoRA, guided decoding, an encoder.

A request's LoRA and its guided decoding are known when it joins; what an encoder computes is in
each step's output of the scheduler. Nothing of a prompt is read but the lengths of its inputs for
encoders. Bills are right without these facts, only less exact: what a feature takes is then
spread over all requests. So a vLLM that tells one of them in another way is metered without it.

Invariant: nothing here raises, and of each feature that cannot be read there is one warning.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.vllm_hooks import canary

logger = meter_logger()

T = TypeVar("T")

# The books take no larger count, and would refuse the step. No input has as many tokens.
TOKENS_MAX = 2**31 - 1


class FeatureReader:
    """Reads the features of one engine's requests and steps."""

    def __init__(self, missing: Mapping[str, str] | None = None) -> None:
        """Leave out what is `missing`: why, by feature. By default the canary says what is."""
        self._unreadable: set[str] = set()
        if missing is None:
            missing = canary.missing_features()
        for feature, why in missing.items():
            self._give_up(feature, why)

    def of_request(self, request: Any) -> tuple[bool, bool]:
        """Return whether a request of vLLM's scheduler has LoRA, and whether it is guided."""
        return (
            self._read(canary.LORA, lambda: request.lora_request is not None, False),
            self._read(canary.GUIDED, lambda: bool(request.use_structured_output), False),
        )

    def encoded(self, output: Any, scheduler: Any) -> dict[str, int] | None:
        """Return the tokens that an encoder computes in a step, by request; None if there are none.

        `output` is what the scheduler returned for the step. The tokens are those that the input
        takes in the prompt.
        """
        return self._read(canary.ENCODER, lambda: _encoded(output, scheduler), None)

    def _read(self, feature: str, read: Callable[[], T], otherwise: T) -> T:
        if feature in self._unreadable:
            return otherwise
        try:
            return read()
        except Exception as error:  # noqa: BLE001 - vLLM's objects may have any shape
            self._give_up(feature, repr(error))
            return otherwise

    def _give_up(self, feature: str, why: str) -> None:
        self._unreadable.add(feature)
        logger.warning(
            "cost meter: the cost of %s is spread over all requests, because vLLM does not tell"
            " which have it as expected: %s",
            feature,
            why,
        )


def _encoded(output: Any, scheduler: Any) -> dict[str, int] | None:
    scheduled = output.scheduled_encoder_inputs
    if not scheduled:
        return None
    found = {}
    for request_id, inputs in scheduled.items():
        features = scheduler.requests[request_id].mm_features
        tokens = sum(int(features[place].mm_position.length) for place in inputs)
        if not 0 <= tokens <= TOKENS_MAX:
            raise ValueError(f"expected 0 to {TOKENS_MAX} tokens of inputs, got {tokens}")
        found[request_id] = tokens
    return found
