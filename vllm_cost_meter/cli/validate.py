"""The command `validate`: how wrong each attribution method is."""

import json
from pathlib import Path
from typing import Annotated

import typer

from vllm_cost_meter.cli.options import Json, Wide, one_line_errors
from vllm_cost_meter.lab.tiny_model import default_path


def validate(
    gpu: Annotated[
        list[str] | None, typer.Option(help="h100, a100 or l4; repeat it for several, or all.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="llama-3.1-8b, qwen3-30b-a3b, or qwen3-30b-a3b-random (experts chosen at random);"
            " repeat it for several, or all."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1000, help="Mean requests per step; or 10, 60 and 160."),
    ] = None,
    steps: Annotated[
        int, typer.Option(min=100, help="Steps to simulate; the first third is not compared.")
    ] = 30_000,
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

    Example: vllm-cost-meter validate --gpu h100 --batch 60
    """
    # This import loads the native attribution; a simulation loads numpy and vLLM too.
    from vllm_cost_meter.lab.validation import command, tables

    with one_line_errors():
        if step_log is not None and (gpu or model or batch):
            raise ValueError("--step-log: expected without --gpu, --model and --batch")
        if server is not None:
            path = str(default_path()) if server == "tiny" else server
            answer, show = command.measured(path, rounds), tables.show_servers
        elif step_log is None:
            plan = command.SimulationPlan(
                gpu or (), model or (), batch or (), steps, every, seed=seed
            )
            answer, show = command.validate(plan), tables.show_truths
        else:
            answer, show = command.replayed(step_log), tables.show_replay
    if as_json:
        print(json.dumps(answer))
    else:
        show(answer, wide=wide)
