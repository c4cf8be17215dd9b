"""The command `validate`: how wrong each attribution method is."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_cost_meter.cli.options import Json, Wide, one_line_errors
from vllm_cost_meter.lab.tiny_model import default_path

Show = Callable[..., None]
ROOFLINE_STEPS = 30_000
RooflineGpus = Annotated[
    list[str] | None,
    typer.Option(help="With --roofline: h100, a100 or l4; repeat it for several, or all."),
]
RooflineModels = Annotated[
    list[str] | None,
    typer.Option(
        help="With --roofline: llama-3.1-8b, qwen3-30b-a3b, or qwen3-30b-a3b-random (experts at"
        " random); repeat it for several, or all."
    ),
]
RooflineBatches = Annotated[
    list[int] | None,
    typer.Option(
        min=1, max=1000, help="With --roofline: mean requests per step; or 10, 60 and 160."
    ),
]
RooflineSteps = Annotated[
    int | None,
    typer.Option(
        min=100,
        help="With --roofline: steps to simulate, or 30,000; the first third is not compared.",
    ),
]


def validate(
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="A simulated server by its name; repeat it for several, or all."),
    ] = None,
    roofline: Annotated[
        bool, typer.Option(help="Simulate steps that are one maximum of two sums instead.")
    ] = False,
    gaming: Annotated[
        bool, typer.Option(help="Show what asking for the same work in another way would gain.")
    ] = False,
    gpu: RooflineGpus = None,
    model: RooflineModels = None,
    batch: RooflineBatches = None,
    steps: RooflineSteps = None,
    every: Annotated[int, typer.Option(min=1, help="Compare every n-th step.")] = 10,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other traffic.")] = 0,
    step_log: Annotated[
        Path | None, typer.Option(help="Replay a file that COST_METER_STEP_LOG wrote instead.")
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            help="Measure on a real server of this model instead: two tenants, apart and"
            " together. A folder or a name; `tiny` is the demo's."
        ),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="With --server: how often.")] = 5,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """How wrong each way to split a step is.

    The truth is simulated, replayed from a step log, or measured on a real server.

    Example: vllm-cost-meter validate --scenario experts-64
    """
    with one_line_errors():
        if not roofline and (gpu or model or batch or steps):
            raise ValueError("--gpu, --model, --batch and --steps: expected with --roofline only")
        kinds = (bool(scenario), roofline, gaming, step_log is not None, server is not None)
        if sum(kinds) > 1:
            raise ValueError(
                "expected one of --scenario, --roofline, --gaming, --step-log and --server"
            )
        if server is not None:
            answer, show = _on_server(server, rounds)
        elif step_log is not None:
            answer, show = _replayed(step_log)
        elif gaming:
            answer, show = _games(seed)
        elif roofline:
            answer, show = _rooflines(
                gpu or (), model or (), batch or (), steps or ROOFLINE_STEPS, every, seed
            )
        else:
            answer, show = _scenarios(scenario or (), every, seed)
    if as_json:
        print(json.dumps(answer))
    else:
        show(answer, wide=wide)


# Each imports what it needs: the native attribution, numpy and vLLM take seconds to load.


def _scenarios(names: Sequence[str], every: int, seed: int) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    return command.judge(command.KernelPlan(names, every, seed=seed)), tables.show_truths


def _rooflines(
    gpus: Sequence[str],
    models: Sequence[str],
    mean_batches: Sequence[int],
    steps: int,
    every: int,
    seed: int,
) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    plan = command.RooflinePlan(gpus, models, mean_batches, steps, every, seed=seed)
    return command.fit_roofline(plan), tables.show_truths


def _games(seed: int) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    return command.games(seed), tables.show_games


def _on_server(server: str, rounds: int) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    path = str(default_path()) if server == "tiny" else server
    return command.measured(path, rounds), tables.show_servers


def _replayed(step_log: Path) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    return command.replayed(step_log), tables.show_replay
