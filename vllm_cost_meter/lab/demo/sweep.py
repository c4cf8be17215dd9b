"""The demo's load sweep: cost against load for its server, and the penalty against full load.

It runs the users' own command `sweep`. Windows are short here, so that the whole sweep takes less
than five minutes on two cores. For results to rely on, use the command's default windows of two
minutes.

Invariant: the exit status is 0 only if the sweep reached full load and the ledger has a penalty
against it.
"""

import subprocess
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from vllm_cost_meter.economics import Declared
from vllm_cost_meter.lab.server import Server, command_path
from vllm_cost_meter.ledger.economics.query import economics
from vllm_cost_meter.ledger.opening import open_ledger
from vllm_cost_meter.units.text import plain

WINDOW_S, WARMUP_S = 12, 5
SHAPE = "128:32"
PARTS = "0.1,0.3,0.6,0.85,1.3"
BURST_REQUESTS = 96
SLO_TTFT_MS = 1000


def sweep_demo(console: Console, server: Server, environment: Mapping[str, str], key: str) -> int:
    """Sweep the demo's server as the tenant with this key; return the exit status."""
    folder = server.log.parent / "sweep"
    words = [
        *("sweep", "--url", server.url, "--side-url", server.side_url, "--shape", SHAPE),
        *("--measure-s", str(WINDOW_S), "--warmup", str(WARMUP_S), "--parts", PARTS),
        *("--burst-requests", str(BURST_REQUESTS), "--slo-ttft-ms", str(SLO_TTFT_MS)),
        *("--folder", str(folder)),
    ]
    console.print(f"\nvllm-cost-meter {' '.join(words)}", soft_wrap=True)
    done = subprocess.run(  # noqa: S603 - our own command
        [command_path("vllm-cost-meter"), *words],
        env={**environment, "OPENAI_API_KEY": key},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode:
        return done.returncode
    return _penalty(console, environment["COST_METER_LEDGER"], folder)


def _penalty(console: Console, ledger: str, folder: Path) -> int:
    with open_ledger(ledger) as reader:
        figures = economics(reader, Declared())["figures"]
    full, penalty = figures["saturation_output_tokens_per_s"], figures["penalty"]
    if penalty is None:
        console.print("NO PENALTY: full load was not reached, or is not in the ledger")
        return 1
    console.print(
        f"of the whole demo, start-up and pauses included: {figures['output_tokens_per_s']:.4g}"
        f" output tokens/s, full load {full:.4g}; penalty {penalty:.3g}",
        soft_wrap=True,
    )
    console.print(f"the plot: {plain(str(folder / 'sweep.png'))}", soft_wrap=True)
    return 0
