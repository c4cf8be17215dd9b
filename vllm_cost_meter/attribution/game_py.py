"""The fair charge of each request in a step, by the cost model in use: its Shapley value.

This is the twin of `csrc/game.pxd`. Both agree bit for bit, so a change to one must be made in the
other.

A step is a cooperative game (docs/explanation/attribution.md): what it takes is known for any
subset of its requests, by a cost model of either form. A request is charged what it adds, averaged
over all orders in which the requests could have joined. With two planes the whole step is one game
(`shapley_py.py`). With a curve it is a sum of games, and so is the charge: what a step takes anyway
is shared equally, what any prefill takes is shared equally among the prefills, what depends on the
tokens of all is in `growths_py.py`, features of requests are in `features_py.py`, and attention is
again the larger of two sums. Two planes know no features.

The marginal cost of a request is v(all) - v(all without it).

Invariant: the charges are >= 0, and add up to v(all) except for rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_cost_meter.attribution.cost_model import (
    DECODE_COMPUTE,
    FIXED,
    PREFILL,
    READ,
    SEQUENCE,
    UNKNOWN_MODEL,
    Coefficients,
    Plane,
    ServedModel,
    TokenCurve,
)
from vllm_cost_meter.attribution.curve_py import (
    CurveWork,
    all_of,
    arithmetic_ns,
    curve_of,
    height,
    reading_ns,
    smoothed,
)
from vllm_cost_meter.attribution.features_py import (
    NO_CHARGES,
    FeatureCharges,
    FeatureWork,
    StepPart,
    all_features,
    features_ns,
)
from vllm_cost_meter.attribution.growths_py import ENUMERATED_MAX, among_many, enumerated
from vllm_cost_meter.attribution.planes_py import ZERO, Work, time_of, total_of
from vllm_cost_meter.attribution.shapley_py import Overlap, solve_overlap

# The weights of a step add up to about this: half of the largest sum allowed.
WEIGHT_SUM = 2**30
# Bounds of the step time that a model may predict. A shorter time would give infinite weights.
SMALLEST_NS, LARGEST_NS = 1e-9, 9.2e18


@dataclass(slots=True, frozen=True)
class StepModel:
    """The published cost model as steps use it."""

    is_curve: bool
    compute: Plane
    memory: Plane
    curve: TokenCurve
    smooth: TokenCurve
    served: ServedModel

    @classmethod
    def of_planes(cls, compute: Plane, memory: Plane) -> "StepModel":
        """Return the model with these two planes."""
        return cls(False, compute, memory, (), (), UNKNOWN_MODEL)

    @classmethod
    def of_curve(cls, coefficients: Coefficients, served: ServedModel) -> "StepModel":
        """Return the model with the curve of these coefficients of a fit."""
        curve = curve_of(coefficients, served.experts.heights())
        return cls(True, ZERO, ZERO, curve, smoothed(curve, served), served)


@dataclass(slots=True, frozen=True)
class _Line:
    """The time of a decode with one token, by what it reads: a straight line."""

    at_0: float
    slope: float


@dataclass(slots=True, frozen=True)
class Player:
    """A request in a step, as its game sees it. `read` is what the time of a decode depends on."""

    tokens: int
    is_prefill: bool
    read: float
    compute_ns: float
    memory_ns: float
    features: FeatureWork


@dataclass(slots=True, frozen=True)
class SolvedStep:
    """The solved game of one step: all that is needed to charge each of its requests."""

    players: list[Player]
    total_ns: float  # v(all)
    base_ns: float  # each request's part of what is shared equally
    sequence_ns: float  # each request's own
    prefill_ns: float  # each prefill's part
    last_prefill_ns: float  # what the step would save without its only prefill
    features: FeatureCharges
    token_ns: float  # a token's part of h, where a request has no part of its own
    growths: dict[int, float]  # place in the step -> part of h
    added: dict[int, float]  # tokens -> what h would be less without so many
    lines: tuple[_Line, _Line]
    overlap: Overlap

    def weigh(self) -> list[int]:
        """Return each request's charge as a weight; all are 0 if the model predicts no time."""
        players, overlap = self.players, self.overlap
        if not self._is_sound():
            return [0] * len(players)
        to_weight = WEIGHT_SUM / self.total_ns
        part, rest = overlap.compute_part, 1.0 - overlap.compute_part
        # The weight of a decode is a straight line in what it reads.
        c, m = self.lines
        own = self.sequence_ns + self.token_ns
        line_0 = part * c.at_0 + rest * m.at_0
        weight_slope = (part * c.slope + rest * m.slope) * to_weight
        weights = []
        for place, player in enumerate(players):
            if self._is_usual(player) and place not in overlap.large:
                mine = own + self.features.charge(player.features)
                weight_0 = (self.base_ns + mine + line_0) * to_weight + 0.5
                weights.append(int(weight_0 + weight_slope * player.read))
                continue
            shared = part * player.compute_ns + rest * player.memory_ns
            growth = self.growths.get(place, self.token_ns * player.tokens)
            charge = self.base_ns + (self.sequence_ns + growth)
            charge += overlap.large.get(place, shared)
            if player.is_prefill:
                charge += self.prefill_ns
            charge += self.features.charge(player.features)
            weights.append(int(charge * to_weight + 0.5))
        return weights

    def margins(self, gpu_ns: float) -> list[float]:
        """Return the marginal cost of each request in a step that took `gpu_ns`, in GPU-ns."""
        gpu_ns = min(gpu_ns, LARGEST_NS)
        if len(self.players) == 1:
            return [gpu_ns]
        to_ns = gpu_ns / self.total_ns if self._is_sound() else 0.0
        overlap = self.overlap
        above_compute = overlap.total_ns - overlap.compute_ns
        above_memory = overlap.total_ns - overlap.memory_ns
        c, m = self.lines
        own = self.sequence_ns + self.added[1]
        c_0, c_slope = (own + (above_compute + c.at_0)) * to_ns, c.slope * to_ns
        m_0, m_slope = (own + (above_memory + m.at_0)) * to_ns, m.slope * to_ns
        margins = []
        for player in self.players:
            if self._is_usual(player):
                margin = min(c_0 + c_slope * player.read, m_0 + m_slope * player.read)
                margin += self.features.saved(player.features) * to_ns
            else:
                added = self.sequence_ns + self.added[player.tokens]
                if player.is_prefill:
                    added += self.last_prefill_ns
                added += self.features.saved(player.features)
                compute, memory = player.compute_ns, player.memory_ns
                margin = to_ns * (added + min(above_compute + compute, above_memory + memory))
            margins.append(margin)
        return margins

    def _is_usual(self, player: Player) -> bool:
        """Return whether it is a decode of one token among many, by far the usual case."""
        is_among_many = len(self.players) > ENUMERATED_MAX
        is_decode = player.tokens == 1 and not player.is_prefill
        return is_among_many and is_decode and not player.features.encoders

    def _is_sound(self) -> bool:
        return SMALLEST_NS < self.total_ns < LARGEST_NS


def solve_step(model: StepModel, parts: Sequence[StepPart | tuple[int, int, bool]]) -> SolvedStep:
    """Solve the game of a step with at least one part. Plain triples have no features."""
    full = [StepPart(*part) for part in parts]
    return _solve_curve(model, full) if model.is_curve else _solve_planes(model, full)


def _solve_planes(model: StepModel, parts: Sequence[StepPart]) -> SolvedStep:
    compute, memory = model.compute, model.memory
    works = [Work.of(part.tokens, part.context) for part in parts]
    everyone = total_of(works)
    players = [
        Player(
            part.tokens,
            part.is_prefill,
            float(part.context),
            time_of(compute, work),
            time_of(memory, work),
            FeatureWork.of(part),
        )
        for part, work in zip(parts, works, strict=True)
    ]
    overlap = solve_overlap(
        (compute[0], memory[0]),
        (time_of(compute, everyone), time_of(memory, everyone)),
        [(player.compute_ns, player.memory_ns) for player in players],
        everyone.tokens > everyone.sequences,
    )
    return SolvedStep(
        players=players,
        total_ns=overlap.total_ns,
        base_ns=overlap.base / len(parts),
        sequence_ns=0.0,
        prefill_ns=0.0,
        last_prefill_ns=0.0,
        features=NO_CHARGES,
        token_ns=0.0,
        growths={},
        added=dict.fromkeys({1, *(player.tokens for player in players)}, 0.0),
        lines=(
            _Line(compute[1] + compute[2], compute[3] + compute[4]),
            _Line(memory[1] + memory[2], memory[3] + memory[4]),
        ),
        overlap=overlap,
    )


def _solve_curve(model: StepModel, parts: Sequence[StepPart]) -> SolvedStep:
    curve, smooth = model.curve, model.smooth
    works = [CurveWork.of(*part[:3], model.served.layers) for part in parts]
    features = [FeatureWork.of(part) for part in parts]
    having = all_features(features)
    everyone = all_of(works)
    players = [
        Player(
            work.tokens,
            work.prefills == 1,
            work.read,
            arithmetic_ns(curve, work),
            reading_ns(curve, work),
            own,
        )
        for work, own in zip(works, features, strict=True)
    ]
    overlap = solve_overlap(
        (0.0, 0.0),
        (arithmetic_ns(curve, everyone), reading_ns(curve, everyone)),
        [(player.compute_ns, player.memory_ns) for player in players],
        everyone.prefills > 0,
    )
    if len(parts) <= ENUMERATED_MAX:
        all_ns, token_ns = height(curve, float(model.served.padded(everyone.tokens))), 0.0
        growths = enumerated(curve, model.served, [work.tokens for work in works])
    else:
        all_ns = height(smooth, float(everyone.tokens))
        lumps = {
            k: work.tokens for k, work in enumerate(works) if work.prefills and work.tokens > 1
        }
        token_ns, growths = among_many(smooth, lumps, everyone.tokens)
    prefill_ns = curve[PREFILL] if everyone.prefills else 0.0
    shared = curve[FIXED] + prefill_ns + curve[SEQUENCE] * everyone.sequences
    shared += features_ns(curve, having)
    return SolvedStep(
        players=players,
        total_ns=shared + all_ns + overlap.total_ns,
        base_ns=curve[FIXED] / len(parts),
        sequence_ns=curve[SEQUENCE],
        prefill_ns=prefill_ns / everyone.prefills if everyone.prefills else 0.0,
        last_prefill_ns=prefill_ns if everyone.prefills == 1 else 0.0,
        features=FeatureCharges.of(curve, having),
        token_ns=token_ns,
        growths=growths,
        added={
            tokens: all_ns - _height_of(model, everyone.tokens - tokens, len(parts))
            for tokens in {1, *(work.tokens for work in works)}
        },
        lines=(_Line(0.0, curve[DECODE_COMPUTE]), _Line(0.0, curve[READ])),
        overlap=overlap,
    )


def _height_of(model: StepModel, tokens: int, requests: int) -> float:
    """Return h of a step with so many requests at a number of tokens, 0 at fewer than none."""
    if requests <= ENUMERATED_MAX:
        return height(model.curve, float(model.served.padded(max(0, tokens))))
    return height(model.smooth, float(tokens))
