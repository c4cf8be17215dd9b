"""Tables for the results of `validate`, with errors in percent."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from vllm_cost_meter.console import print_table
from vllm_cost_meter.lab.validation.real_server.verdict import REFUSED
from vllm_cost_meter.units.text import plain

PERCENTILES = ("median", "p95", "max")
OURS = "shapley"
TRUTH_ROW = "(the truth's noise)"


def show_truths(answer: Mapping[str, Any], *, wide: bool = False) -> None:
    """Print a table per truth, from the answer that `--json` prints, and the worst tenant."""
    for name, found in answer.items():
        above = (
            f"{name}: mean batch {found['mean_batch']:.1f}, {found['requests']} requests in"
            f" {found['compared_steps']} of {found['steps']} steps; errors in %"
        )
        below = "".join(f"{line}\n" for line in (_tenants_line(found), _memory_line(found)) if line)
        print_table(truth_table(found), above, below, wide=wide)
    print(worst_line(answer))


def show_games(answer: Mapping[str, Any], *, wide: bool = False) -> None:
    """Print what each game brings, from the answer that `--json` prints."""
    table = Table(box=None, pad_edge=False)
    table.add_column("game")
    for head in ("usually ms", "played ms", "change %", "others ms", "others, played ms"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, game in answer.items():
        table.add_row(
            name,
            f"{game['usual_ms']:.1f}",
            f"{game['played_ms']:.1f}",
            f"{100 * game['change']:+.1f}",
            f"{game['others_usual_ms']:.1f}",
            f"{game['others_played_ms']:.1f}",
        )
    print_table(
        table, "What a client pays for the same work, and what others pay beside it", "", wide=wide
    )


def worst_line(answer: Mapping[str, Any]) -> str:
    """Return which tenant the meter's method is most wrong about, over all truths."""
    error, tenant, truth = max(
        (
            (error, tenant, truth)
            for truth, found in answer.items()
            for tenant, error in found["methods"][OURS]["tenants"].items()
        ),
        key=lambda one: abs(one[0]),
    )
    return f"worst tenant error of {OURS}: {100 * error:+.2f} % ({tenant}; {truth})"


def truth_table(found: Mapping[str, Any]) -> Table:
    """Return each method's errors against one truth. The last row is the truth's own noise."""
    table = Table(box=None, pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    for head in (
        *(f"request\n{part}" for part in PERCENTILES),
        *(f"tenant\n{part}" for part in PERCENTILES),
        "\nmisplaced",
        "outside interval\nGPU time",
        "outside interval\nparts",
        "\nuncharged",
        "claimed\np95",
        "within\nclaim",
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for method, errors in found["methods"].items():
        table.add_row(
            method,
            *_percentiles(errors["request_error"]),
            *_percentiles(errors["tenant_error"]),
            *(
                _percent(errors[key])
                for key in (
                    "misplaced_share",
                    "outside_interval_share",
                    "outside_interval_parts_share",
                    "uncharged_share",
                )
            ),
            _percent((errors["claimed_error"] or {}).get("p95")),
            _percent(errors["within_claim_share"]),
        )
    noise, truth = found["noise"], found["truth"]
    table.add_row(
        TRUTH_ROW,
        *_percentiles(noise["request_error"]),
        *_percentiles(noise["tenant_error"]),
        _percent(noise["misplaced_share"]),
        _percent(truth["outside_interval_share"]),
        _percent(truth["outside_interval_parts_share"]),
        _percent(0.0),
        *(_percent(None), _percent(None)),
    )
    return table


def show_server(found: Mapping[str, Any], *, wide: bool = False) -> None:
    """Print what each player was measured to cost, what splits charge it, and a verdict if any."""
    above = (
        f"{found['model']} on {found['hardware']}, vLLM {found['vllm_version']}, in GPU-ms:"
        f" {len(found['players'])} requests together take {found['all_ns'] / 1e6:.1f};"
        f" {found['rounds']} rounds of {len(found['coalitions_ns'])} coalitions; ours is"
        f" {found['method']}"
    )
    below = (
        f"95 % noise of all together: {_percent(found['noise_share'])} % of GPU time;"
        f" a charge may be off by its noise and {_percent(found['tolerance_share'])} % of GPU time"
    )
    print_table(server_table(found), plain(above), below, wide=wide)
    if found["verdict"] != REFUSED:
        print(f"verdict: {found['verdict']}: {found['why']}")


def server_table(found: Mapping[str, Any]) -> Table:
    """Return each player's measured value and charges in GPU-ms; below, what is misplaced."""
    table = Table(box=None, pad_edge=False)
    table.add_column("\nplayer", no_wrap=True)
    table.add_column("\nwhat it does")
    for head in (
        "prompt:output\ntokens",
        "measured\n95 %",
        *(f"{s}\nerror" for s in found["splits"]),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for name, player in found["players"].items():
        measured_ns, all_ns = player["measured_ns"], found["all_ns"]
        table.add_row(
            plain(name),
            player["does"],
            f"{player['prompt_tokens']}:{player['output_tokens']}",
            f"{measured_ns / 1e6:.1f} ± {player['noise_ns'] / 1e6:.1f}",
            *(
                f"{ns / 1e6:.1f} ({100 * (ns - measured_ns) / all_ns:+.1f} %)"
                for ns in player["charged_ns"].values()
            ),
        )
    misplaced = (f"{100 * split['misplaced_share']:.1f} %" for split in found["splits"].values())
    table.add_row("misplaced", "", "", "", *misplaced)
    return table


def show_replay(answer: Mapping[str, Any], *, wide: bool = False) -> None:
    """Print each method's charges for a step log, and the requests with the largest differences."""
    log = answer["step_log"]
    above = (
        f"{log['model']} on vLLM {log['vllm_version']}, run {log['run_id'][:8]}:"
        f" {log['requests']} requests in {log['steps']} steps,"
        f" {log['gpu_time_ns'] / 1e9:.6f} GPU-seconds"
    )
    print_table(difference_table(answer), plain(above), wide=wide)
    table = Table(box=None, pad_edge=False)
    table.add_column("request", no_wrap=True)
    for method in answer["methods"]:
        table.add_column(method, justify="right", no_wrap=True)
    for request_id, ns in answer["requests"].items():
        table.add_row(
            plain(request_id), *(f"{ns[method] / 1e9:.6f}" for method in answer["methods"])
        )
    print_table(table, wide=wide)


def difference_table(answer: Mapping[str, Any]) -> Table:
    """Return each method's total, and its difference from each other method."""
    table = Table(box=None, pad_edge=False)
    table.add_column("\nmethod", no_wrap=True)
    table.add_column("charged\nGPU-seconds", justify="right", no_wrap=True)
    table.add_column("\nagainst", no_wrap=True)
    for head in (*(f"request, %\n{part}" for part in PERCENTILES), "moved\n%"):
        table.add_column(head, justify="right", no_wrap=True)
    for method, found in answer["methods"].items():
        for other, difference in found["differences"].items():
            table.add_row(
                method,
                f"{found['charged_ns'] / 1e9:.6f}",
                other,
                *_percentiles(difference["request_difference"]),
                _percent(difference["moved_share"]),
            )
    return table


def _tenants_line(found: Mapping[str, Any]) -> str:
    tenants = found["methods"][OURS]["tenants"].items()
    return f"{OURS}, each tenant: " + ", ".join(f"{name} {100 * e:+.2f}" for name, e in tenants)


def _memory_line(found: Mapping[str, Any]) -> str:
    if "memory" not in found:
        return ""
    needed, there = (found["memory"][key] for key in ("needed_bytes", "gpu_bytes"))
    if needed <= there:
        return ""
    return (
        f"weights and KV cache need {needed / 1e9:.0f} GB, and the GPU has {there / 1e9:.0f} GB:"
        " it could not hold this batch, and is simulated as if it could"
    )


def _percentiles(values: Mapping[str, float | None]) -> list[str]:
    return [_percent(values[part]) for part in PERCENTILES]


def _percent(value: float | None) -> str:
    # Adding 0.0 avoids "-0.00".
    return "-" if value is None else f"{round(100 * value, 2) + 0.0:.2f}"
