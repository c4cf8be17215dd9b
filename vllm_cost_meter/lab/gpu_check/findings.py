"""What a check's results say in short: what was not measured and why, and what was found wrong.

Invariant: nothing is said of a part that was not asked for.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_cost_meter.lab.gpu_check.plan import BOOKS, ENERGY, GAME, THROUGHPUT
from vllm_cost_meter.lab.validation.real_server.verdict import DIFFERS, REFUSED

# States of a part.
MEASURED, LEFT_OUT, FAILED = "measured", "left out", "failed"

CheckResults = Mapping[str, Any]


def figures_of(found: CheckResults, part: str) -> Mapping[str, Any] | None:
    """Return the figures of a part, None if it has none."""
    told = found["parts"].get(part, {})
    figures: Mapping[str, Any] | None = told.get("figures")
    return figures


def verdict_of(game: Mapping[str, Any]) -> str:
    """Return why a game has its verdict, in the words of a check where it has other options."""
    if game["verdict"] == REFUSED and game["noise_share"] > game["noise_share_max"]:
        return (
            f"the noise was {game['noise_share']:.1%} of GPU time in {game['rounds']} rounds, and"
            f" at most {game['noise_share_max']:.0%} allows one; leave the machine to the check, or"
            " give it more time"
        )
    return str(game["why"])


def unmeasured(found: CheckResults) -> list[str]:
    """Return what was not measured and why, a line each."""
    lines = [
        f"{name} ({part['state']}): {part['why']}"
        for name, part in found["parts"].items()
        if part["state"] != MEASURED
    ]
    if (game := figures_of(found, GAME)) and game["verdict"] == REFUSED:
        lines.append(f"{GAME} (no verdict): {verdict_of(game)}")
    if energy := figures_of(found, ENERGY):
        why_not = {
            w["energy"]["why_not"]: None for w in energy["windows"] if w["energy"]["why_not"]
        }
        lines += [f"joules in {ENERGY}: {why}" for why in why_not]
    if (throughput := figures_of(found, THROUGHPUT)) and not all(throughput["ratios"].values()):
        pairs = throughput["number_of_pairs"]
        lines.append(f"ratios in {THROUGHPUT}: {pairs} pairs are too few, or a figure was 0")
    return lines


def wrong_in(found: CheckResults) -> list[str]:
    """Return what was found wrong, a line each; nothing if all that was measured is right."""
    return list(_wrong(found))


def _wrong(found: CheckResults) -> Iterator[str]:
    if why := found.get("page_failed"):
        yield f"the page could not be written at first: {why}"
    for name, part in found["parts"].items():
        if part["state"] == FAILED:
            yield f"{name} failed: {part['why'].splitlines()[0]}"
    if (game := figures_of(found, GAME)) and game["verdict"] == DIFFERS:
        yield str(game["why"])
    if books := figures_of(found, BOOKS):
        asked, different = books["replies"]["asked"], len(books["replies"]["different"])
        if different:
            yield f"{different} of {asked} replies said another cost than the ledger"
        for finding in books["doctor"]["findings"]:
            if not finding["ok"]:
                yield f"doctor: {finding['name']}: {finding['detail']}"
    for name in (BOOKS, THROUGHPUT):
        if (part := figures_of(found, name)) and part["audit"]["balanced"] is not True:
            is_known = part["audit"]["balanced"] is not None
            what = "do not balance" if is_known else "are not known to balance"
            yield f"{name}: the books of that server {what}: {part['audit']['reason']}"
    windows = (figures_of(found, ENERGY) or {}).get("windows", [])
    if failed := sum(len(window["traffic"]["failures"]) for window in windows):
        yield f"{failed} requests of mixed traffic failed"
