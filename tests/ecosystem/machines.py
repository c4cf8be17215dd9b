"""Machines of a fleet: each a disk, a real vLLM server on it, its clients and its line.

Clients remember what they were told. A reply counts as told once it was whole.

Invariant: what clients were told is known here, whatever happens to the server.
"""

import json
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import httpx

from tests.ecosystem.line import Line
from tests.integration.server import (
    LONG_PROMPT,
    SIDE_BY_SIDE,
    TENANT_KEYS,
    Server,
    kv_arguments,
)
from tests.integration.traffic import Reply, ask
from tests.support.waiting import wait_for
from vllm_cost_meter.lab.server import meter_arguments

CLOCK_SOURCE = Path(__file__).with_name("clock_ahead.c")
INTERVAL_S = 0.5
ROUTES = ("/v1/completions", "/v1/chat/completions")
_CLIENTS = 2
PAUSE_S = 0.05


class Told(NamedTuple):
    """What a client was told of its request."""

    tenant: str
    cost_nanousd: int
    gpu_time_ns: int
    prompt_tokens: int
    output_tokens: int


def compile_clock(folder: Path) -> Path:
    """Compile the library that sets the wall clock of a program ahead."""
    library = folder / "clock_ahead.so"
    command = [*os.environ.get("CC", "cc").split(), "-Wall", "-Wextra", "-Werror", "-O2"]
    command += ["-shared", "-fPIC", "-o", str(library), str(CLOCK_SOURCE)]
    subprocess.run(command, check=True)
    return library


def clock_ahead(library: Path, seconds: int) -> dict[str, str]:
    """Return the environment of a program whose wall clock is ahead; other clocks are right."""
    return {"LD_PRELOAD": str(library), "CMT_AHEAD_S": str(seconds)}


class Machine:
    """A machine of the fleet. It is made without a server; `launch` starts one."""

    def __init__(
        self,
        name: str,
        folder: Path,
        fleet: str,
        line: Line,
        environment: dict[str, str],
        kv_role: str,
    ) -> None:
        """`fleet` is the URL of the database, which the server reaches by the line.

        `kv_role` says which half of requests vLLM's KV connector takes it to have. All machines
        share the folder of the connector.
        """
        self.line = line
        self.told: dict[str, Told] = {}
        self._random = Random(name)
        self._numbers = count()
        self._lives = 0
        self._is_over = threading.Event()
        self._clients: list[threading.Thread] = []
        self.server = Server(
            folder / name,
            arguments=[*meter_arguments(), *kv_arguments(kv_role, folder / "kv")],
            environment={
                "COST_METER_FLEET": line.by_line(fleet),
                "COST_METER_FLEET_INTERVAL_S": str(INTERVAL_S),
                "COST_METER_LABELS": f"machine={name}",
                **SIDE_BY_SIDE,
                **environment,
            },
        )

    @property
    def ledger_url(self) -> str:
        return self.server.ledger_url

    def launch(self) -> None:
        """Begin to start a server on this machine's disk; the log of an earlier one is kept."""
        log = self.server.folder / "server.log"
        if log.exists():
            shutil.move(log, log.with_name(f"server-{self._lives}.log"))
        self._lives += 1
        self.server.launch()

    def wait(self) -> None:
        """Wait until it serves."""
        wait_for(
            self._serves,
            timeout_s=240,
            pause_s=0.2,
            what=f"{self.server.folder.name} does not serve",
        )

    def _serves(self) -> bool:
        process = self.server.process
        assert process is not None
        assert process.poll() is None, self.server.log[-3000:]
        try:
            url = f"{self.server.url}/health"
            return httpx.get(url, timeout=2, verify=False).status_code == 200
        except httpx.TransportError:
            return False

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Have its clients ask without end meanwhile."""
        self._is_over.clear()
        self._clients = [threading.Thread(target=self._ask_on) for _ in range(_CLIENTS)]
        for client in self._clients:
            client.start()
        try:
            yield
        finally:
            self._is_over.set()
            for client in self._clients:
                client.join()

    def wait_for_replies(self, more: int) -> None:
        """Wait until clients were told of so many more requests."""
        enough = len(self.told) + more
        wait_for(lambda: len(self.told) >= enough, timeout_s=240, what="no replies came")

    @property
    def is_up(self) -> bool:
        """Whether its server's process runs."""
        process = self.server.process
        return process is not None and process.poll() is None

    def send_failures(self) -> int:
        """Return how often its server could not send, by its metrics."""
        text = httpx.get(f"{self.server.side_url}/metrics", timeout=30).text
        found = re.search(
            r"^cost_meter_fleet_failures(?:_total)?(?:{.*})? (\S+)", text, re.MULTILINE
        )
        return 0 if found is None else int(float(found[1]))

    def ask_half(self, x_request_id: str, **options: Any) -> str:
        """Send one half of a request, as a router does; return by which id its bill is found."""
        tenant = next(iter(TENANT_KEYS))
        with self.server.client(tenant, verify=False) as client:
            client.headers["x-request-id"] = x_request_id
            reply = ask(client, ROUTES[0], prompt=LONG_PROMPT, **options)
        self._note(reply, tenant)
        found: str = reply.headers["x-cost-meter-request-id"]
        return found

    def kill(self) -> None:
        """End all processes of the server at once."""
        self.server.kill()

    def stop(self) -> None:
        """Stop the server as an operator does."""
        self.server.stop()

    def _ask_on(self) -> None:
        tenant = self._random.choice(list(TENANT_KEYS))
        while not self._is_over.is_set():
            try:
                # Nothing is encrypted, and to load certificates takes longer than a request.
                with self.server.client(tenant, verify=False) as client:
                    while not self._is_over.is_set():
                        self._ask_one(client, tenant)
                        tenant = self._random.choice(list(TENANT_KEYS))
                        client.headers["authorization"] = f"Bearer {TENANT_KEYS[tenant]}"
            except (httpx.HTTPError, json.JSONDecodeError, KeyError):
                # The server was killed, is not there yet, or told of an error in place of a reply.
                time.sleep(0.2)

    def _ask_one(self, client: httpx.Client, tenant: str) -> None:
        options = {"max_tokens": self._random.randint(2, 16), "user": f"n{next(self._numbers)}"}
        if self._random.random() < 0.5:
            options |= {"stream": True, "stream_options": {"include_usage": True}}
        reply = ask(client, self._random.choice(ROUTES), **options)
        self._note(reply, tenant)
        time.sleep(PAUSE_S)

    def _note(self, reply: Reply, tenant: str) -> None:
        if reply.usage is None:
            return  # The stream was not whole.
        if (cost := reply.headers.get("x-cost-meter-cost-usd")) is not None:
            name = reply.headers["x-cost-meter-request-id"]
            gpu_s = reply.headers["x-cost-meter-gpu-seconds"]
        else:
            # Floats of this size have nine exact places.
            cost = f"{reply.usage['cost']:.9f}"
            name = reply.usage["cost_details"]["request_id"]
            gpu_s = f"{reply.usage['cost_details']['gpu_seconds']:.9f}"
        self.told[name] = Told(
            tenant, _nano(cost), _nano(gpu_s), reply.prompt_tokens, reply.output_tokens
        )


def _nano(amount: str) -> int:
    return int(Decimal(amount).scaleb(9))
