"""What only some requests of a step need: LoRA, an encoder, guided decoding.

This is the twin of `csrc/features.pxd`. Both agree bit for bit, so a change to one must be made in
the other.

Each of the three features adds to a step

    a, if any request of the step has it, + b * units

The units are the tokens of requests with LoRA, the rows that guided decoding samples, and the
tokens that an encoder computes. The Shapley value gives `a` equally to the requests that have the
feature, and `b` times its own units to each. Without a request the step would save its own units,
and `a` if no other has the feature.

A request is guided in a step if the step samples for it: a decode, or the last chunk of a prompt. A
decode with drafts samples each of its tokens.

Invariant: a request without features is charged nothing of them.
"""

from collections.abc import Sequence
from typing import NamedTuple

from vllm_cost_meter.attribution.cost_model import (
    ENCODER,
    ENCODER_TOKEN,
    GUIDED,
    GUIDED_ROW,
    LORA,
    LORA_TOKEN,
)

# The tokens of an encoder that a part of a step has room for.
ENCODER_TOKENS_MAX = 2**24 - 1


class StepPart(NamedTuple):
    """A request in a step. `context` is its length at the end of the step."""

    tokens: int
    context: int
    is_prefill: bool
    has_lora: bool = False
    is_guided: bool = False
    encoder_tokens: int = 0


class FeatureWork(NamedTuple):
    """How many of one or several requests have each feature, and their units."""

    lora: int = 0
    lora_tokens: int = 0
    guided: int = 0
    guided_rows: int = 0
    encoders: int = 0
    encoder_tokens: int = 0

    @classmethod
    def of(cls, part: StepPart) -> "FeatureWork":
        """Return the work of one request."""
        rows = 1 if part.is_prefill else part.tokens
        return cls(
            int(part.has_lora),
            part.tokens if part.has_lora else 0,
            int(part.is_guided),
            rows if part.is_guided else 0,
            int(part.encoder_tokens > 0),
            part.encoder_tokens,
        )

    def plus(self, other: "FeatureWork") -> "FeatureWork":
        """Return this work and another."""
        return FeatureWork(*(a + b for a, b in zip(self, other, strict=True)))

    def amounts(self) -> tuple[float, ...]:
        """Return what the terms of a curve are multiplied by, in their order from LORA on."""
        return (
            1.0 if self.lora else 0.0,
            float(self.lora_tokens),
            1.0 if self.guided else 0.0,
            float(self.guided_rows),
            1.0 if self.encoders else 0.0,
            float(self.encoder_tokens),
        )


NO_FEATURES = FeatureWork()


def all_features(works: Sequence[FeatureWork]) -> FeatureWork:
    """Return the features of several requests together."""
    total = NO_FEATURES
    for work in works:
        total = total.plus(work)
    return total


def features_ns(curve: Sequence[float], work: FeatureWork) -> float:
    """Return the time of the features of a step."""
    total = 0.0
    for place, amount in enumerate(work.amounts()):
        total += curve[LORA + place] * amount
    return total


class FeatureCharges(NamedTuple):
    """What requests with features pay of them, for LoRA, guided decoding and the encoder.

    `shared` is each request's part of what any of them adds, `own` that of a unit. `last` is what
    the step would save of the former without one of them.
    """

    shared: tuple[float, float, float] = (0.0, 0.0, 0.0)
    last: tuple[float, float, float] = (0.0, 0.0, 0.0)
    own: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def of(cls, curve: Sequence[float], everyone: FeatureWork) -> "FeatureCharges":
        """Return the charges in a step with this work."""
        a = (curve[LORA], curve[GUIDED], curve[ENCODER])
        lora, guided, encoder = (
            (ns / count if count else 0.0, ns if count == 1 else 0.0)
            for ns, count in zip(
                a, (everyone.lora, everyone.guided, everyone.encoders), strict=True
            )
        )
        return cls(
            (lora[0], guided[0], encoder[0]),
            (lora[1], guided[1], encoder[1]),
            (curve[LORA_TOKEN], curve[GUIDED_ROW], curve[ENCODER_TOKEN]),
        )

    def charge(self, work: FeatureWork) -> float:
        """Return what a request with this work pays."""
        return self._sum(self.shared, work)

    def saved(self, work: FeatureWork) -> float:
        """Return what the step would save without a request with this work."""
        return self._sum(self.last, work)

    def _sum(self, once: tuple[float, float, float], work: FeatureWork) -> float:
        total = 0.0
        if work.lora:
            total += once[0] + self.own[0] * work.lora_tokens
        if work.guided:
            total += once[1] + self.own[1] * work.guided_rows
        if work.encoders:
            total += once[2] + self.own[2] * work.encoder_tokens
        return total


NO_CHARGES = FeatureCharges()
