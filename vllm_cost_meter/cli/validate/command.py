"""The command `validate`: how wrong each attribution method is."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from vllm_cost_meter.cli.options import Json, Wide, one_line_errors
from vllm_cost_meter.cli.validate.options import (
    EveryStep,
    ModelNames,
    OfGaming,
    OnRoofline,
    OnServer,
    OutputTokens,
    PlayerCount,
    PromptTokens,
    RooflineBatches,
    RooflineGpus,
    RooflineSteps,
    RoundCount,
    Scenarios,
    Seed,
    ServerUrl,
    SideEndpointUrl,
    StepLogFile,
    VllmArguments,
)
from vllm_cost_meter.console import interruptible
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.units.text import plain

Show = Callable[..., None]
FAILED, INTERRUPTED = 1, 130
ROOFLINE_STEPS = 30_000


def validate(
    scenario: Scenarios = None,
    roofline: OnRoofline = False,
    gaming: OfGaming = False,
    gpu: RooflineGpus = None,
    model: ModelNames = None,
    batch: RooflineBatches = None,
    steps: RooflineSteps = None,
    every: EveryStep = 10,
    seed: Seed = 0,
    step_log: StepLogFile = None,
    server: OnServer = False,
    url: ServerUrl = None,
    side_url: SideEndpointUrl = None,
    players: PlayerCount = None,
    prompt_tokens: PromptTokens = None,
    output_tokens: OutputTokens = None,
    rounds: RoundCount = None,
    vllm_arguments: VllmArguments = None,
    wide: Wide = False,
    as_json: Json = False,
) -> None:
    """How wrong each way to split a step is.

    The truth is simulated, replayed from a step log, or measured on a real server.

    Example: vllm-cost-meter validate --scenario experts-64
    """
    on_server = {
        "vllm_arguments": vllm_arguments,
        "url": url,
        "side_url": side_url,
        "players": players,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "rounds": rounds,
    }
    with one_line_errors():
        if not roofline and (gpu or batch or steps):
            raise ValueError("--gpu, --batch and --steps: expected with --roofline only")
        if model and not (roofline or server):
            raise ValueError("--model: expected with --roofline or --server only")
        if not server and any(value is not None for value in on_server.values()):
            raise ValueError(
                "--url, --side-url, --players, --prompt-tokens, --output-tokens, --rounds and"
                " arguments of vLLM: expected with --server only"
            )
        kinds = (bool(scenario), roofline, gaming, step_log is not None, server)
        if sum(kinds) > 1:
            raise ValueError(
                "expected one of --scenario, --roofline, --gaming, --step-log and --server"
            )
        if server:
            answer, show = _on_server(model or (), seed, on_server)
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
    if server:
        _end_by_verdict(answer)


def _end_by_verdict(answer: dict[str, Any]) -> None:
    """End with status 1 unless the bills agree with what was measured."""
    from vllm_cost_meter.lab.validation.real_server.verdict import AGREES, REFUSED

    if answer["verdict"] == REFUSED:
        raise _failed(answer["why"], FAILED)
    if answer["verdict"] != AGREES:
        raise typer.Exit(FAILED)


def _failed(why: str, status: int) -> typer.Exit:
    print(plain(f"vllm-cost-meter validate: {why}"), file=sys.stderr)
    return typer.Exit(status)


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


def _on_server(
    models: Sequence[str], seed: int, given: dict[str, Any]
) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables
    from vllm_cost_meter.lab.validation.real_server.session import ServerPlan

    if len(models) > 1:
        raise ValueError(f"--model: expected one model with --server, got {len(models)}")
    told = {name: value for name, value in given.items() if value is not None}
    if models:
        told["model"] = models[0]
    plan = ServerPlan(seed=seed, **told)
    try:
        with interruptible():
            return command.measured(plan), tables.show_server
    except KeyboardInterrupt:
        raise _failed("interrupted; a server that was started has ended", INTERRUPTED) from None
    except (ServerError, OSError) as error:
        raise _failed(str(error), FAILED) from None


def _replayed(step_log: Path) -> tuple[dict[str, Any], Show]:
    from vllm_cost_meter.lab.validation import command, tables

    return command.replayed(step_log), tables.show_replay
