"""Compare a server's bills with the Shapley value that was measured on it, and say the verdict.

The charges are the bills of the bursts with all players, of those bursts whose times are the
measured value of all: so every split and the measured values add up to the same time. A split
passes if no player's charge is further from the measured value than its noise and `TOLERANCE_SHARE`
of all GPU time.

No verdict is given where it would mean nothing: where the noise of all players together is above
`NOISE_SHARE_MAX` of all GPU time, and where equal parts, wrong for such players, would pass too.

Invariant: the charges of each split, and the measured values, add up to the value of all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vllm_cost_meter.lab.validation.real_server.estimate import (
    fastest,
    half_widths,
    shapley_of,
)
from vllm_cost_meter.lab.validation.real_server.players import (
    PlayerBill,
    PlayingRequest,
    charges_of,
    members_of,
)

OURS = "ours"
EQUAL = "equal"
# Half widths of the 95 % intervals, added over the players, as a part of the value of all.
NOISE_SHARE_MAX = 0.10
# What a charge may be off beyond the noise, as a part of the value of all.
TOLERANCE_SHARE = 0.02

AGREES, DIFFERS, REFUSED = "agrees", "differs", "refused"

Round = Mapping[int, Sequence[PlayerBill]]


@dataclass(frozen=True, slots=True)
class _Figures:
    """Values of coalitions, Shapley values and charges of players, from some rounds; in GPU-ns."""

    values_ns: list[float]
    measured_ns: list[float]
    charged_ns: dict[str, list[float]]

    def flat(self) -> list[float]:
        """Return the measured values, then how far each split's charges are from them."""
        errors = (
            charge - measured
            for charges in self.charged_ns.values()
            for charge, measured in zip(charges, self.measured_ns, strict=True)
        )
        return [*self.measured_ns, *errors]


def judge(players: Sequence[PlayingRequest], rounds: Sequence[Round]) -> dict[str, Any]:
    """Return the measured values, the charges of each split, and the verdict, ready for JSON.

    Each round has the bills of every coalition's members, in the players' order.
    """
    found = _figures(players, rounds)
    widths = half_widths(
        lambda some: _figures(players, [rounds[n] for n in some]).flat(), len(rounds)
    )
    count = len(players)
    all_ns = found.values_ns[-1]
    noise_ns, rest = widths[:count], widths[count:]
    error_noise_ns = {
        split: rest[count * number : count * (number + 1)]
        for number, split in enumerate(found.charged_ns)
    }
    splits = {
        split: _split(players, found, charges, error_noise_ns[split])
        for split, charges in found.charged_ns.items()
    }
    noise_share = sum(noise_ns) / all_ns
    verdict, why = _verdict(splits, noise_share, len(rounds))
    return {
        "rounds": len(rounds),
        "all_ns": round(all_ns),
        "noise_share": noise_share,
        "noise_share_max": NOISE_SHARE_MAX,
        "tolerance_share": TOLERANCE_SHARE,
        "players": {
            player.name: {
                "does": player.does,
                "prompt_tokens": player.prompt_tokens,
                "output_tokens": player.output_tokens,
                "measured_ns": round(found.measured_ns[number]),
                "noise_ns": round(noise_ns[number]),
                "charged_ns": {
                    split: round(charges[number]) for split, charges in found.charged_ns.items()
                },
                "error_noise_ns": {
                    split: round(error_noise_ns[split][number]) for split in found.charged_ns
                },
            }
            for number, player in enumerate(players)
        },
        "splits": splits,
        "coalitions_ns": {
            " + ".join(players[number].name for number in members_of(coalition, count)): round(ns)
            for coalition, ns in enumerate(found.values_ns)
            if coalition
        },
        "verdict": verdict,
        "why": why,
    }


def _figures(players: Sequence[PlayingRequest], rounds: Sequence[Round]) -> _Figures:
    values_ns = [0.0]
    counted: list[Sequence[PlayerBill]] = []
    for coalition in range(1, 1 << len(players)):
        times_ns = [_time_ns(one[coalition]) for one in rounds]
        counted = [rounds[place][coalition] for place in fastest(times_ns)]
        values_ns.append(fmean(map(_time_ns, counted)))
    # The last coalition is that of all: its charges come from the bursts that gave its value.
    charged = [
        {OURS: [float(bill.gpu_time_ns) for bill in bills], **charges_of(players, bills)}
        for bills in counted
    ]
    return _Figures(
        values_ns,
        shapley_of(values_ns),
        {
            split: [fmean(ns) for ns in zip(*(one[split] for one in charged), strict=True)]
            for split in charged[0]
        },
    )


def _time_ns(bills: Sequence[PlayerBill]) -> int:
    return sum(bill.gpu_time_ns for bill in bills)


def _split(
    players: Sequence[PlayingRequest],
    found: _Figures,
    charges: Sequence[float],
    error_noise_ns: Sequence[float],
) -> dict[str, Any]:
    all_ns = found.values_ns[-1]
    errors = [charge - ns for charge, ns in zip(charges, found.measured_ns, strict=True)]
    outside = [
        player.name
        for player, error, noise in zip(players, errors, error_noise_ns, strict=True)
        if abs(error) > noise + TOLERANCE_SHARE * all_ns
    ]
    return {
        "misplaced_share": sum(map(abs, errors)) / 2 / all_ns,
        "outside": outside,
        "passes": not outside,
    }


def _verdict(
    splits: Mapping[str, Mapping[str, Any]], noise_share: float, rounds: int
) -> tuple[str, str]:
    if noise_share > NOISE_SHARE_MAX:
        needed = rounds * (noise_share / NOISE_SHARE_MAX) ** 2
        return REFUSED, (
            f"expected noise of at most {NOISE_SHARE_MAX:.0%} of GPU time, measured"
            f" {noise_share:.1%} in {rounds} rounds: no verdict; leave the machine to the server,"
            f" or take about --rounds {int(needed) + 1}"
        )
    if splits[EQUAL]["passes"]:
        return REFUSED, (
            "expected equal parts to differ from the measured value, and they pass: no verdict;"
            " take more --rounds, or longer prompts and outputs"
        )
    ours = splits[OURS]
    if ours["passes"]:
        return AGREES, (
            f"the bills agree with the measured Shapley value: {ours['misplaced_share']:.1%} of GPU"
            f" time misplaced, noise {noise_share:.1%}"
        )
    return DIFFERS, (
        f"the bills differ from the measured Shapley value by more than the noise and"
        f" {TOLERANCE_SHARE:.0%} of GPU time: {', '.join(ours['outside'])};"
        f" {ours['misplaced_share']:.1%} of GPU time misplaced"
    )
