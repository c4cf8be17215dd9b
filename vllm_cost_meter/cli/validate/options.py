"""The options of the command `validate`: which truth, and what each kind of truth takes.

Invariant: an option that was not given is None or false, so the command knows what was asked for.
"""

from pathlib import Path
from typing import Annotated

import typer

Scenarios = Annotated[
    list[str] | None,
    typer.Option(help="A simulated server by its name; repeat it for several, or all."),
]
OnRoofline = Annotated[
    bool,
    typer.Option("--roofline", help="Simulate steps that are one maximum of two sums instead."),
]
OfGaming = Annotated[
    bool,
    typer.Option("--gaming", help="Show what asking for the same work in another way would gain."),
]
StepLogFile = Annotated[
    Path | None, typer.Option(help="Replay a file that COST_METER_STEP_LOG wrote instead.")
]
EveryStep = Annotated[int, typer.Option(min=1, help="Compare every n-th step.")]
Seed = Annotated[int, typer.Option(min=0, help="Another seed, other traffic.")]
RooflineGpus = Annotated[
    list[str] | None,
    typer.Option(help="With --roofline: h100, a100 or l4; repeat it for several, or all."),
]
ModelNames = Annotated[
    list[str] | None,
    typer.Option(
        help="With --roofline: llama-3.1-8b, qwen3-30b-a3b, or qwen3-30b-a3b-random (experts at"
        " random); repeat it for several, or all. With --server: the model to serve, a folder or a"
        " name; or `small`, which needs no download, or the demo's `tiny`."
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
OnServer = Annotated[
    bool,
    typer.Option(
        "--server",
        help="Measure on a real server instead: all coalitions of a few requests, against their"
        " bills. Exit status 1 if they differ, or if the noise allows no verdict.",
    ),
]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        help="With --server: vLLM's URL, of a metered server that is idle otherwise; without it one"
        " is started. Its API key is taken from OPENAI_API_KEY."
    ),
]
SideEndpointUrl = Annotated[
    str | None,
    typer.Option(
        help="With --url: the side endpoint's URL, otherwise port 9477 of the same host; its admin"
        " token is taken from COST_METER_ADMIN_TOKEN."
    ),
]
PlayerCount = Annotated[
    int | None, typer.Option(help="With --server: how many requests play, 2 to 7; otherwise 5.")
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        help="With --server: prompt tokens of all players together, which must fit into one step;"
        " otherwise 2,000."
    ),
]
OutputTokens = Annotated[
    int | None, typer.Option(help="With --server: the longest output; otherwise 32 tokens.")
]
RoundCount = Annotated[
    int | None,
    typer.Option(help="With --server: how often each coalition runs; otherwise 12 times."),
]
VllmArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="VLLM_ARGUMENT",
        help="With --server, behind --: arguments of the server that is started.",
    ),
]
