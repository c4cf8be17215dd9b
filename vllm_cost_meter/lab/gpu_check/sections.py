"""The sections of a check's page, one for each part that has figures.

Each says in its first line what was asked, and in its last what the figures do not say. Times are
GPU-ms, errors and noises percent.

Invariant: every figure here is in the results, or computed from them.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_cost_meter.lab.gpu_check.findings import (
    CheckResults,
    figures_of,
    unmeasured,
    verdict_of,
    wrong_in,
)
from vllm_cost_meter.lab.gpu_check.model import GIB
from vllm_cost_meter.lab.gpu_check.overlap import LONG, SHORT, VALUES_MIN
from vllm_cost_meter.lab.gpu_check.plan import BOOKS, ENERGY, GAME, OVERLAP, THROUGHPUT
from vllm_cost_meter.lab.gpu_check.served import METERED, UNMETERED
from vllm_cost_meter.units.text import plain, significant

NO_GPU = "THESE FIGURES SAY NOTHING OF A GPU: vLLM's CPU build served a tiny model."


@dataclass(frozen=True, slots=True)
class PageTable:
    """A table: its head, and its rows of as many cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class PageSection:
    """A title, what to know before the table, the table, and what to know after it."""

    title: str
    before: Sequence[str] = ()
    table: PageTable | None = None
    after: Sequence[str] = ()
    # Lines to show as they are.
    verbatim: Sequence[str] = ()


def sections_of(found: CheckResults) -> list[PageSection]:
    """Return all sections of a page, those without figures left out."""
    makers = {
        GAME: _game,
        ENERGY: _energy,
        OVERLAP: _overlap,
        BOOKS: _books,
        THROUGHPUT: _throughput,
    }
    parts = [
        make(figures)
        for name, make in makers.items()
        if (figures := figures_of(found, name)) is not None
    ]
    return [_head(found), _machine(found), *parts, _commands(found)]


def _head(found: CheckResults) -> PageSection:
    machine = found["machine"]
    on = machine["gpu"]["name"] if machine["gpu"] else f"CPU, {machine['cpu']}"
    lines = [] if found["is_gpu"] else [NO_GPU]
    if missing := unmeasured(found):
        lines += ["Not measured:", *(f"- {plain(_first_line(line))}" for line in missing)]
    if wrong := wrong_in(found):
        lines += ["WRONG:", *(f"- {plain(_first_line(line))}" for line in wrong)]
    elif any(part["state"] == "measured" for part in found["parts"].values()):
        lines += ["Nothing was found wrong in what was measured."]
    title = f"GPU check of vllm_cost_meter {machine['meter']} on {on}, {found['began_at'][:10]}"
    return PageSection(plain(title), lines)


def _machine(found: CheckResults) -> PageSection:
    machine, gpu, model = found["machine"], found["machine"]["gpu"], found["model"]
    rows = [
        *(
            []
            if gpu is None
            else [
                (
                    "GPU",
                    f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, {gpu['uuid']}"
                    f"{', a MIG slice of it' if gpu['is_slice'] else ''}",
                ),
                ("GPUs of the machine", f"{gpu['cards_of_machine']}, of which one was used"),
                ("driver", f"{gpu['driver']}, CUDA {gpu['cuda']}"),
            ]
        ),
        ("CPU", f"{machine['cpu']}, {machine['cpus']} cores"),
        ("system", f"{machine['system']}, Python {machine['python']}"),
        ("vLLM", f"{machine['vllm']}, torch {machine['torch']}"),
        ("meter", f"{machine['meter']}, commit {machine['meter_commit'] or 'unknown'}"),
        (
            "model",
            f"random weights, shape {model['shape']}: {model['num_hidden_layers']} layers of"
            f" {model['hidden_size']}",
        ),
        (
            "time",
            f"{found['seconds']:.0f} s of {found['budget_s']:.0f}, from {found['began_at']}",
        ),
    ]
    return PageSection("On what", table=PageTable(("", ""), [_plain(row) for row in rows]))


def _game(game: Mapping[str, Any]) -> PageSection:
    all_ns = game["all_ns"]
    rows = []
    for name, player in game["players"].items():
        cells = [
            name,
            f"{player['prompt_tokens']}:{player['output_tokens']}",
            f"{_ms(player['measured_ns'])} ± {_ms(player['noise_ns'])}",
        ]
        for charged_ns in player["charged_ns"].values():
            error = (charged_ns - player["measured_ns"]) / all_ns
            cells.append(f"{_ms(charged_ns)} ({_signed(error)})")
        rows.append(cells)
    splits = game["splits"]
    misplaced = [_percent(split["misplaced_share"]) for split in splits.values()]
    rows.append(["misplaced", "", "", *misplaced])
    head = ("player", "tokens", "measured, 95 %", *(f"{name} (error)" for name in splits))
    return PageSection(
        "Do bills agree with what was measured?",
        [
            f"All {len(game['coalitions_ns'])} coalitions of {len(game['players'])} requests ran"
            f" {game['rounds']} times; measured is the Shapley value of their times, in GPU-ms;"
            f" errors are parts of all GPU time ({_ms(all_ns)}).",
        ],
        PageTable(head, [_plain(row) for row in rows]),
        [
            f"Verdict: {game['verdict']}: {plain(verdict_of(game))}",
            f"Noise of all together {_percent(game['noise_share'])};"
            f" {game['repeated_bursts']} bursts did not run together and were played again.",
        ],
    )


def _energy(energy: Mapping[str, Any]) -> PageSection:
    rows = []
    for window in energy["windows"]:
        found, traffic = window["energy"], window["traffic"]
        rows.append(
            [
                str(window["clients"]) if window["clients"] else "none",
                f"{found['seconds']:.1f}",
                str(traffic["requests"]),
                f"{traffic['output_tokens'] / traffic['seconds']:.0f}",
                _joules(found["counter_mj"], found["counter_noise_mj"]),
                _joules(found["integral_mj"], found["integral_noise_mj"]),
                _joules(found["meter_mj"], None),
                *_ratios(window),
            ]
        )
    head = (
        *("clients", "s", "requests", "tokens/s", "NVML counter, J", "power integrated, J"),
        *("meter's books, J", "integrated / counter", "meter / counter"),
    )
    return PageSection(
        "Mixed traffic and its energy",
        ["Chats, retrieval and writing at once, by so many clients; energy of the same windows."],
        PageTable(head, [_plain(row) for row in rows]),
        [
            "± is what the counter may be off at both ends of a window, and what power changed in"
            " the second over which it is averaged; that of a ratio is what it may be off by both."
            " Both ways are NVML's: no wattmeter was there.",
        ],
    )


def _overlap(overlap: Mapping[str, Any]) -> PageSection:
    rows = []
    for kind in (SHORT, LONG):
        steps = overlap["steps"][kind]
        for which in ("without", "with"):
            chunk = f", chunk of {steps['chunk']}" if which == "with" else ""
            rows.append(
                [
                    f"{steps['decodes']} decodes at {steps['context']}{chunk}",
                    _spread(steps[which]),
                    *(_ms(form[kind][which]) for _, form in _forms(overlap)),
                ]
            )
    less = f"{_ms(overlap['less_ns'])} ± {_ms(overlap['less_noise_ns'])}"
    rows.append(
        [
            "the chunk adds less beside long contexts by",
            less,
            *(_ms(form["less_ns"]) for _, form in _forms(overlap)),
        ]
    )
    rows.append(
        [
            "mean error of the four steps",
            "",
            *(_percent(form["mean_error"]) for _, form in _forms(overlap)),
        ]
    )
    head = ("step", "measured, 95 %", *(name for name, _ in _forms(overlap)))
    counts = [overlap["steps"][kind]["with"]["values"] for kind in (SHORT, LONG)]
    few = f"Of fewer than {VALUES_MIN} steps the interval is their range, and less than 95 %."
    return PageSection(
        "Does attention's reading overlap with arithmetic?",
        [_says(overlap)],
        PageTable(head, [_plain(row) for row in rows]),
        [
            f"Steps with a chunk: {counts[0]} and {counts[1]}; medians, GPU-ms. The models are"
            " those published before these steps, and after them.",
            *([few] if min(counts) < VALUES_MIN else []),
            "The form in use was "
            + " and ".join(f"{m['form_in_use']} {when}" for when, m in overlap["predicted"].items())
            + ".",
        ],
    )


def _says(overlap: Mapping[str, Any]) -> str:
    less_ns, noise_ns = overlap["less_ns"], overlap["less_noise_ns"]
    if less_ns > noise_ns:
        return "Yes: beside long contexts the same chunk adds less to a step, beyond the noise."
    if less_ns < -noise_ns:
        return "No: beside long contexts the same chunk adds more to a step, beyond the noise."
    return "Not seen: what a chunk adds beside long and short contexts differs within the noise."


def _forms(overlap: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for when, model in overlap["predicted"].items():
        for name, form in model["forms"].items():
            yield f"{name} {when}", form


def _books(books: Mapping[str, Any]) -> PageSection:
    audit, model, replies = books["audit"], books["model"], books["replies"]
    differences = [
        (name, value) for run in audit["runs"] for name, value in run.items() if name != "wall_ns"
    ]
    off = {name: value for name, value in differences if value}
    unknown = ", ".join(name for name, value in differences if value is None)
    not_compared = f"; not compared: {unknown}" if unknown else ""
    balanced = {True: "balanced", False: "DO NOT balance", None: "unknown"}[audit["balanced"]]
    rows = [
        ("audit", f"{balanced}; differences: {off or 'none'}{not_compared}"),
        (
            "replies with the ledger's cost",
            f"{replies['asked'] - len(replies['different'])} of {replies['asked']}",
        ),
        ("requests", str(books["totals"]["requests"])),
        ("meter's own time", f"{_percent(books['totals']['own_time_share'])} of busy time"),
    ]
    if model is not None:
        rows += [
            (
                "cost model",
                f"{model['form']}, {model['steps']} steps learnt from; prior {model['prior']}",
            ),
            (
                "mean error of a step",
                f"curve {_percent(model['error_other_form'])}, two planes"
                f" {_percent(model['error_two_planes'])};"
                f" {_percent(model['explained'])} of the variance explained",
            ),
        ]
        rows += [
            (f"charges of {kind.replace('_', ' ')}", _claim(error))
            for kind, error in (model["charge_errors"] or {}).items()
        ]
    notes = [
        f"doctor, {finding['state']}: {finding['name']}: {plain(finding['detail'])}"
        for finding in books["doctor"]["findings"]
        if finding["state"] != "ok"
    ]
    return PageSection(
        "Do the books balance?",
        ["What the run's own ledger says at the end."],
        PageTable(("", ""), [_plain(row) for row in rows]),
        notes or ["doctor: all checks are ok."],
    )


def _throughput(throughput: Mapping[str, Any]) -> PageSection:
    rows = []
    for figure, ratio in throughput["ratios"].items():
        means = throughput["means"][figure]
        rows.append(
            [
                figure,
                *(_significant(means[name]) for name in (METERED, UNMETERED)),
                "-"
                if ratio is None
                else f"{ratio['ratio']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})",
            ]
        )
    load = throughput["load"]
    shape = load["shape"]
    books = {True: "balance", False: "DO NOT balance", None: "may balance or not: that is unknown"}
    return PageSection(
        "What does the meter cost?",
        [
            f"{throughput['number_of_pairs']} pairs of runs, A B B A: {load['requests']} requests"
            f" of {shape['input_tokens']}:{shape['output_tokens']} tokens,"
            f" {load['concurrency']} at a time; both servers stand side by side, and one is"
            " driven while the other waits.",
        ],
        PageTable(("figure", "metered", "unmetered", "ratio, 95 %"), [_plain(row) for row in rows]),
        [
            f"The meter's own time: {_percent(throughput['own_time_share'])} of busy time; its"
            f" books {books[throughput['audit']['balanced']]}.",
            "Each server was started once, so the luck of one start is in the ratio.",
        ],
    )


def _commands(found: CheckResults) -> PageSection:
    environment = found["machine"]["environment"]
    settings = (f"{name}={shlex.quote(value)} \\" for name, value in environment.items())
    lines = [*settings, found["command"]]
    for name, server in found["servers"].items():
        started = server["start_s"]
        up = "did not start" if started is None else f"up after {started:.0f} s"
        lines += ["", f"# {name}, {up}", server["command"]]
    return PageSection("Commands", verbatim=[plain(line) for line in lines])


# -- figures --------------------------------------------------------------------------------------


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else text


def _plain(row: Sequence[str]) -> list[str]:
    return [plain(str(cell)) for cell in row]


def _gib(size: int | None) -> str:
    return "memory unknown" if size is None else f"{size / GIB:.0f} GiB"


def _ms(ns: float) -> str:
    return f"{round(ns / 1e6, 3) + 0.0:.3f}"  # + 0.0: no -0.000


def _percent(part: float | None) -> str:
    return "-" if part is None else f"{100 * part:.2f} %"


def _signed(part: float) -> str:
    return f"{100 * part:+.1f} %"


def _ratios(window: Mapping[str, Any]) -> Iterator[str]:
    """Yield power integrated and the meter's books by the counter, with what these may be off.

    The meter reads the same counter, so at each end the two are at most one jump apart.
    """
    energy = window["energy"]
    jumps_mj, power_mj = energy["counter_noise_mj"] or 0, energy["integral_noise_mj"] or 0
    for name, noise_mj in (
        ("integral_by_counter", jumps_mj + power_mj),
        ("meter_by_counter", jumps_mj),
    ):
        ratio = window[name]
        off = 0 if ratio is None else noise_mj / energy["counter_mj"]
        yield "-" if ratio is None else f"{ratio:.4f} ± {off:.4f}"


def _claim(error: float) -> str:
    return "not known yet" if error >= 1 else f"known to {_percent(error)}"


def _joules(mj: float | None, noise_mj: float | None) -> str:
    if mj is None:
        return "-"
    noise = "" if noise_mj is None else f" ± {noise_mj / 1000:.1f}"
    return f"{mj / 1000:.1f}{noise}"


def _spread(spread: Mapping[str, float]) -> str:
    return f"{_ms(spread['median_ns'])} ({_ms(spread['low_ns'])} to {_ms(spread['high_ns'])})"


def _significant(value: float | None) -> str:
    return "-" if value is None else significant(value, 5)
