"""Watches long streams from outside: what the side endpoint says of each while it runs."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.integration.server import TENANT_KEYS, Server
from tests.integration.traffic import PROMPT

LOOK_EVERY_S = 0.2
STEP_S = 0.05


@dataclass
class Watched:
    """One stream, and what was told of it while it ran."""

    x_request_id: str
    tenant: str
    response_id: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def grew(self) -> bool:
        """Whether it was seen running twice, with more used the second time."""
        seen = [row["gpu_time_ns"] for row in self.rows]
        return len(seen) > 1 and seen[0] < seen[-1]


def watch(
    server: Server,
    streams: list[Watched],
    max_tokens: int,
    look: Callable[[Watched], None] = lambda _stream: None,
) -> None:
    """Stream all at once, each on a connection of its own, and look at them until all have ended.

    A token takes STEP_S or more. `look` is called, in a thread, each time one was seen running.
    """

    async def run() -> None:
        running = [asyncio.create_task(_stream(server, one, max_tokens)) for one in streams]
        while not all(task.done() for task in running):
            for one in streams:
                row = await asyncio.to_thread(server.row_of, one.x_request_id)
                if row is not None and row["state"] == "running":
                    one.rows.append(row)
                    await asyncio.to_thread(look, one)
            await asyncio.sleep(LOOK_EVERY_S)
        await asyncio.gather(*running)

    with server.paced(STEP_S):
        asyncio.run(run())


async def _stream(server: Server, watched: Watched, max_tokens: int) -> None:
    headers = {
        "authorization": f"Bearer {TENANT_KEYS[watched.tenant]}",
        "x-request-id": watched.x_request_id,
    }
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True}
    async with (
        httpx.AsyncClient(base_url=server.url, headers=headers, timeout=120) as client,
        client.stream("POST", "/v1/completions", json={**body, "stream": True}) as reply,
    ):
        async for line in reply.aiter_lines():
            if not watched.response_id and line.startswith("data: {"):
                watched.response_id = json.loads(line.removeprefix("data: "))["id"]
