"""The command `demo`: a real server with the meter inside, three tenants, and their bill."""

from typing import Annotated

import typer

from vllm_cost_meter.lab.tiny_model import default_path


def demo(
    model: Annotated[
        str | None, typer.Option(help="Model to serve; a tiny random one otherwise.")
    ] = None,
    keep: Annotated[bool, typer.Option(help="Leave the server running at the end.")] = False,
    sweep: Annotated[
        bool, typer.Option(help="Measure cost against load instead, and plot it.")
    ] = False,
    print_model_path: Annotated[
        bool, typer.Option(help="Print where the tiny model is, and do nothing else.")
    ] = False,
) -> None:
    """See it all without a GPU: a real server and its bill.

    Three tenants use a tiny model; you get the bill, and a check of each figure.

    Example: vllm-cost-meter demo --keep
    """
    if print_model_path:
        print(default_path())
        return
    # The demo imports the OpenAI client, which printing the path does not need.
    from vllm_cost_meter.lab.demo.run import run_demo

    raise typer.Exit(run_demo(model, keep=keep, sweep=sweep))
