"""The command `gpu-check`: what the meter is worth on this machine's GPU, on one page.

Exit status: 0 if nothing was found wrong in what was measured, 1 if something was or a part failed,
2 for wrong usage and without a GPU, 130 after Ctrl-C. What was measured until then is written.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_cost_meter.cli.options import one_line_errors
from vllm_cost_meter.console import interruptible, print_lines
from vllm_cost_meter.errors import CostMeterError, in_one_line
from vllm_cost_meter.units.text import plain

if TYPE_CHECKING:
    from vllm_cost_meter.lab.gpu_check.plan import CheckPlan

WRONG, INTERRUPTED = 1, 130


def gpu_check(
    shape: Annotated[
        str | None,
        typer.Option(
            help="Shape of the model of random weights: 8b or 1b; otherwise by the card's memory."
        ),
    ] = None,
    budget_s: Annotated[
        float, typer.Option(help="Seconds that all of it may take; parts that do not fit are left.")
    ] = 1200.0,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="A part: game, energy, overlap, books or throughput; repeat it for several. By"
            " default all run."
        ),
    ] = None,
    folder: Annotated[
        Path, typer.Option(help="The folder for the page, all figures and the servers' logs.")
    ] = Path("gpu-check"),
    allow_cpu: Annotated[
        bool,
        typer.Option(
            "--allow-cpu", help="Run it on vLLM's CPU build too. Such figures say nothing of a GPU."
        ),
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Another seed, other prompts.")] = 0,
    vllm_arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="VLLM_ARGUMENT", help="Behind --: more arguments of the servers."),
    ] = None,
) -> None:
    """What is the meter worth on this GPU? One page of it.

    It serves a model of random weights, so nothing is downloaded: bills against a measured game,
    energy against NVML, a test of the cost model's form, the books, and throughput with the meter
    and without it.

    Example: vllm-cost-meter gpu-check --budget-s 600
    """
    from vllm_cost_meter.lab.gpu_check.plan import PARTS, CheckPlan

    with one_line_errors():
        plan = CheckPlan(
            folder=folder,
            shape=shape,
            parts=part or PARTS,
            budget_s=budget_s,
            allow_cpu=allow_cpu,
            seed=seed,
            vllm_arguments=vllm_arguments or (),
        )
    if status := _run(plan):
        raise typer.Exit(status)


def _run(plan: "CheckPlan") -> int:
    """Run a check, print its page, and return the exit status."""
    from vllm_cost_meter.lab.gpu_check.check import GpuCheck
    from vllm_cost_meter.lab.gpu_check.findings import wrong_in
    from vllm_cost_meter.lab.gpu_check.page import TEXT_FILE

    with one_line_errors():
        try:
            check = GpuCheck(plan, lambda line: print(plain(line), file=sys.stderr, flush=True))
        except OSError as error:
            where, why = plan.folder, error.strerror
            raise ValueError(f"--folder: {where} cannot be written: {why}") from None
    status = 0
    try:
        with interruptible():
            check.run()
    except KeyboardInterrupt:
        print("vllm-cost-meter gpu-check: interrupted; the servers have ended", file=sys.stderr)
        status = INTERRUPTED
    except (CostMeterError, OSError) as error:
        print(plain(f"vllm-cost-meter gpu-check: {in_one_line(error)}"), file=sys.stderr)
        status = WRONG
    if (page := plan.folder / TEXT_FILE).exists():
        print_lines(page.read_text(encoding="utf-8").splitlines())
    print(f"written to {plan.folder}", file=sys.stderr)
    return status or (WRONG if wrong_in(check.found) else 0)
