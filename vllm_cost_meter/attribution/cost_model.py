"""Types and terms of the cost model, shared by the native code and its Python twin.

They stand apart from the twin so that an engine with native code loads none of it. The theory is in
`curve_py.py` and `planes_py.py`, and in docs/explanation/attribution.md.

Invariant: no step passes through here; what is computed follows from a model or its coefficients.
"""

from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

# The method that splits a step by a model.
SHAPLEY = "shapley"
# The forms of the model. Earlier versions had a curve without features (`EARLIER_CURVE`).
TWO_PLANES, CURVE = "two planes", "curve with features"
EARLIER_CURVE = "curve"

# A plane has one coefficient each for 1, tokens, sequences, products and context.
Plane = tuple[float, float, float, float, float]
Planes = tuple[Plane, Plane]  # compute, memory

# Corners of the curve, in tokens. Few tokens choose most experts; arithmetic is the limit from
# hundreds on, and it comes in tiles.
KNOTS = (
    *(0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448),
    *(512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 4096, 8192, 16384),
)
# Where the free slopes of a fit begin; each is a corner.
RAMPS = (
    *(0, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448),
    *(512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 4096),
)
# The terms of a curve: the own ones, then a slope from each corner on.
FIXED, PREFILL, SEQUENCE, PAIRS, PREFILL_COMPUTE, DECODE_COMPUTE, READ = range(7)
# The last own terms are those of features, each what any adds to a step, and what each unit does:
# a token of a request with LoRA, a row sampled by guided decoding, a token of an encoder.
LORA, LORA_TOKEN, GUIDED, GUIDED_ROW, ENCODER, ENCODER_TOKEN, SLOPES = range(7, 14)
FEATURES = SLOPES - LORA
CURVE_TERMS = SLOPES + len(KNOTS)
# The coefficients of a fit: the own terms, then a slope for each ramp, then one expert's reading.
EXPERTS = SLOPES + len(RAMPS)
FIT_TERMS = EXPERTS + 1

TokenCurve = tuple[float, ...]  # CURVE_TERMS of them
Coefficients = tuple[float, ...]  # FIT_TERMS of them

# Kinds of charges whose errors are told apart: prefills by the tokens of their chunk, and decodes
# by their context; each up to the number, then those beyond.
PREFILL_KINDS = (32, 128, 512)
DECODE_KINDS = (4096, 32_768)
CHARGE_KINDS = len(PREFILL_KINDS) + 1 + len(DECODE_KINDS) + 1
CHARGE_KIND_NAMES = (
    *(f"prefill_to_{tokens}_tokens" for tokens in PREFILL_KINDS),
    "prefill_beyond",
    *(f"decode_to_{context}_context" for context in DECODE_KINDS),
    "decode_beyond",
)


def charge_kind(tokens: int, context: int, is_prefill: bool) -> int:
    """Return the kind of a charge: prefills first, small ones before large ones."""
    if is_prefill:
        return bisect_left(PREFILL_KINDS, tokens)
    return len(PREFILL_KINDS) + 1 + bisect_left(DECODE_KINDS, context)


class PhaseErrors(NamedTuple):
    """The parts by which a bill's prefill and its decode may be off; 1 where that is unknown."""

    prefill: float
    decode: float

    @classmethod
    def of(cls, errors: Sequence[float], prefill_tokens: int, context: int) -> "PhaseErrors":
        """Return those of a bill, by the `errors` of the kinds of charges.

        All tokens of its prefill count as one chunk, and `context` is that of its last token.
        """
        prefill = charge_kind(prefill_tokens, prefill_tokens, True)
        return cls(errors[prefill], errors[charge_kind(1, context, False)])

    def are_known(self, prefill_ns: int, decode_ns: int) -> bool:
        """Return whether the error is known of each phase that took time."""
        return not (prefill_ns and self.prefill >= 1.0) and not (decode_ns and self.decode >= 1.0)

    def gpu_ns(self, prefill_ns: int, decode_ns: int) -> int:
        """Return how many GPU-ns of these may be misplaced: at most all of them.

        Errors of prefill and decode are taken to add up.
        """
        misplaced = round(prefill_ns * self.prefill + decode_ns * self.decode)
        return min(misplaced, prefill_ns + decode_ns)


# Of a bill that had all its steps for itself: what was measured is its own.
NO_ERROR = PhaseErrors(0.0, 0.0)


class Experts(NamedTuple):
    """How many experts a layer has, and how many each token chooses; 0 in a dense model."""

    number: int = 0
    per_token: int = 0

    def heights(self) -> list[float]:
        """Return the expected number of distinct experts at each corner of the curve."""
        if not self.number:
            return [0.0] * len(KNOTS)
        left_out = 1.0 - self.per_token / self.number
        return [self.number * (1.0 - left_out**knot) for knot in KNOTS]


class Layers(NamedTuple):
    """How many of a model's layers see all of the context, and how many see `window` tokens back.

    Only the ratio of the numbers matters.
    """

    whole: int = 1
    windowed: int = 0
    window: int = 0


class ServedModel(NamedTuple):
    """What the cost model knows of a served model from its configuration.

    `captured` are the batch sizes, in tokens and ascending, for which vLLM captured a GPU graph. A
    smaller batch is computed as the next of them.
    """

    experts: Experts = Experts()
    layers: Layers = Layers()
    captured: tuple[int, ...] = ()

    def padded(self, tokens: int) -> int:
        """Return how many tokens a batch with so many computes."""
        place = bisect_left(self.captured, tokens)
        return self.captured[place] if tokens and place < len(self.captured) else tokens


UNKNOWN_MODEL = ServedModel()


def token_ns(coefficients: Coefficients) -> float:
    """Return what a further token of a large prefill takes, in GPU-ns, without attention.

    It is the mean slope of the curve where arithmetic is the limit.
    """
    begin, end = RAMPS.index(512), RAMPS.index(2048)
    widths = [RAMPS[place + 1] - RAMPS[place] for place in range(begin, end)]
    slopes = coefficients[SLOPES + begin : SLOPES + end]
    grown = sum(slope * width for slope, width in zip(slopes, widths, strict=True))
    return grown / sum(widths)


class Model(NamedTuple):
    """A published cost model and its quality: what `StepMeter.model` returns.

    `errors_*` are running means of |predicted / measured - 1| of both forms, each step predicted
    before the fit learnt from it; `explained` is the share of the variance of step times that the
    form in use explains. `charge_errors` are the parts by which charges of each kind may be off
    (`charge_error_py.py`); 1 where that is unknown.
    """

    version: int
    form: str
    planes: Planes
    coefficients: Coefficients
    served: ServedModel
    steps: int
    error_two_planes: float
    error_curve: float
    explained: float
    charge_errors: tuple[float, ...]
