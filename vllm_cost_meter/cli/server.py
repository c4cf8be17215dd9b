"""The command `server`: answers every question about a ledger over HTTP, without a vLLM server."""

import asyncio
import os
import sys
from typing import Annotated

import typer

from vllm_cost_meter.api_server.shipping.settings_puller import SharedFollower
from vllm_cost_meter.cli.options import Config, Ledger, ledger_url, one_line_errors
from vllm_cost_meter.config.loading import load_settings
from vllm_cost_meter.endpoint.server import address_of, bind
from vllm_cost_meter.endpoint.standalone.serving import Standalone
from vllm_cost_meter.errors import CostMeterError
from vllm_cost_meter.ledger.reader import LedgerReader

HostOption = Annotated[
    str | None, typer.Option(help="The address to listen on; otherwise COST_METER_HOST.")
]
PortOption = Annotated[
    int | None,
    typer.Option(min=0, max=65_535, help="The port; 0 is any. Otherwise COST_METER_PORT."),
]


def server(
    ledger: Ledger = None, config: Config = None, host: HostOption = None, port: PortOption = None
) -> None:
    """Answer all of this over HTTP: for a fleet, or any ledger.

    It is the side endpoint of a metered server, for the books of all of them: reports, statements,
    audit, budgets, requests. It needs neither vLLM nor a GPU, and several may answer from one
    database. The settings say who may ask, what GPUs cost, and which budgets there are. With an
    admin token they can be changed there, where the fleet shares them; nothing else is written.

    Example: vllm-cost-meter server --ledger postgresql+psycopg://reader@db/fleet --port 9478
    """
    url = ledger_url(ledger, config)
    with one_line_errors():
        asked = {"COST_METER_HOST": host, "COST_METER_PORT": port}
        given = {name: str(value) for name, value in asked.items() if value is not None}
        follower = SharedFollower(url)
        environ = {**os.environ, **given}
        settings = load_settings(environ, config=config, shared=follower.first)
        fleet = follower if settings.fleet_settings else None
        LedgerReader(url).close()  # one line now, in place of one with each answer
        if settings.port is None:
            raise CostMeterError("port: expected 0 to 65535, got off")
        listening = bind(settings.host, settings.port)
        if listening is None:
            raise CostMeterError(
                f"expected a free port, got {settings.host} port {settings.port}, which is taken"
            )
    print(f"{address_of(listening)}/cost/summary", file=sys.stderr, flush=True)
    asyncio.run(Standalone(url, settings, fleet, environ).serve(listening))
