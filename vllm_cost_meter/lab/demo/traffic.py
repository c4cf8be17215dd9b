"""The demo's traffic: three tenants at once, with real clients, and what the clients were told.

`chat-team` chats through the `openai` client: complete replies, streams, two choices at a time, and
one client that leaves in mid-stream. `search-team` asks short questions about one long text, so the
prefix cache helps. `batch-team` is `vllm bench serve`. The first two go on until the third is done.
Nothing is retried, so the number of requests sent is exact.

Invariant: `sent` counts every HTTP request that a tenant sent to a generating route.
"""

import asyncio
import json
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from openai.types import CompletionUsage

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.server import end_of
from vllm_cost_meter.lab.sweep.bench import Shape, Target, bench_command

CHAT, SEARCH, BATCH = TENANTS = ("chat-team", "search-team", "batch-team")

REQUEST_TIMEOUT_S = 300
# A client waits so long between two requests.
THINK_S = 0.5
ROUNDS_MAX = 500
CHAT_TOKENS, SEARCH_TOKENS = 48, 16
# A stream's usage contains this text if it carries the cost.
COST_DETAILS = '"cost_details"'
# The client that does not wait for its reply leaves after so many chunks.
CHUNKS_READ = 8
# A scheduler may leave a client runnable without a processor for many seconds: 14 s were seen
# beside an engine that spins. Its reply comes to its own end meanwhile. So a client that takes
# longer than this to read those chunks may not have left in mid-stream, and leaves another reply.
LEAVES_WITHIN_S = 2.0
LEAVES_MAX = 5
BATCH_REQUESTS, BATCH_INPUT_TOKENS, BATCH_OUTPUT_TOKENS = 48, 128, 64
BATCH_REQUESTS_PER_SECOND = 12

QUESTIONS = (
    "Who pays for a step of the engine?",
    "Write a short story about a river and a mountain.",
    "How does a computer store numbers?",
    "Where does the time go?",
)
LONG_TEXT = (
    "Every morning the neighbours came with bread, cakes and pies. A small roll was ready in ten "
    "minutes, while a large loaf stayed for an hour. At last she put a clock beside the oven and "
    "wrote down, for each minute, what was inside. When the fire burned and the oven was empty "
    "she wrote that down too. In the evening the minutes in her book were exactly the minutes of "
    "the day. "
) * 12


@dataclass(frozen=True, slots=True)
class Told:
    """The figures that one reply told its client; `cost_usd` is None without a cost."""

    tenant: str
    response_id: str
    prompt_tokens: int
    cached_tokens: int | None
    output_tokens: int
    cost_usd: str | None


@dataclass(slots=True)
class Sightings:
    """The requests that clients sent, and the replies that they saw."""

    sent: Counter[str] = field(default_factory=Counter)
    told: list[Told] = field(default_factory=list)
    # One complete reply's response id and cost headers.
    reply_id: str = ""
    headers: list[tuple[str, str]] = field(default_factory=list)
    # One stream's data line with its usage.
    last_chunk: str = ""
    # The id of the response whose client left.
    abandoned_id: str = ""
    # The result that `vllm bench serve` saved.
    batch: Mapping[str, Any] = field(default_factory=dict)


class Traffic:
    """Runs the three tenants against one server."""

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str,
        keys: Mapping[str, str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seen = Sightings()
        self._clock = clock
        self._url, self._model, self._tokenizer, self._keys = url, model, tokenizer, keys
        self._batch_done = asyncio.Event()

    async def run(self, folder: Path, environment: Mapping[str, str]) -> Sightings:
        """Send all requests, and return what the clients saw once the last reply came.

        The batch's files go to `folder`. Raises ServerError if a request or the batch fails.
        """
        async with self._client(CHAT) as chat, self._client(SEARCH) as search:
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._leave(chat))
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._batch(folder, environment))
                    for ask in (self._chat, self._stream, self._two_choices):
                        group.create_task(self._until_batch_is_done(chat, ask))
                    group.create_task(self._until_batch_is_done(search, self._search))
                    group.create_task(self._until_batch_is_done(search, self._search))
            except* openai.OpenAIError as errors:
                raise ServerError(f"a request failed: {errors.exceptions[0]}") from errors
            except* ServerError as errors:
                raise errors.exceptions[0] from None
        return self.seen

    def _client(self, tenant: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self._url}/v1",
            api_key=self._keys[tenant],
            max_retries=0,
            timeout=REQUEST_TIMEOUT_S,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        )

    async def _until_batch_is_done(
        self, client: openai.AsyncOpenAI, ask: Callable[[openai.AsyncOpenAI, str], Awaitable[None]]
    ) -> None:
        for number in range(ROUNDS_MAX):
            await ask(client, QUESTIONS[number % len(QUESTIONS)])
            with suppress(TimeoutError):
                await asyncio.wait_for(self._batch_done.wait(), THINK_S)
                return

    # -- chat-team ------------------------------------------------------------------------------

    def _chat_arguments(self, question: str) -> dict[str, Any]:
        self.seen.sent[CHAT] += 1
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": CHAT_TOKENS,
        }

    async def _chat(self, client: openai.AsyncOpenAI, question: str, choices: int = 1) -> None:
        raw = await client.chat.completions.with_raw_response.create(
            **self._chat_arguments(question), n=choices
        )
        reply = raw.parse()
        cost = raw.headers.get("x-cost-meter-cost-usd")
        self._note(CHAT, reply.id, reply.usage, cost)
        if not self.seen.headers and cost is not None and choices == 1:
            self.seen.reply_id = reply.id
            self.seen.headers = [
                (name, value)
                for name, value in raw.headers.items()
                if name.startswith(("x-cost-meter-", "x-litellm-"))
            ]

    async def _two_choices(self, client: openai.AsyncOpenAI, question: str) -> None:
        await self._chat(client, question, choices=2)

    async def _stream(self, client: openai.AsyncOpenAI, question: str) -> None:
        # Until one has carried its cost: while the batch's client starts, the machine is busy.
        if COST_DETAILS not in self.seen.last_chunk:
            await self._raw_stream(client, question)
            return
        stream = await client.chat.completions.create(
            **self._chat_arguments(question),
            stream=True,
            stream_options={"include_usage": True},
        )
        async for chunk in stream:
            if chunk.usage is not None:
                cost = (chunk.usage.model_extra or {}).get("cost")
                told = None if cost is None else f"{cost:.9f}"
                self._note(CHAT, chunk.id, chunk.usage, told)

    async def _raw_stream(self, client: openai.AsyncOpenAI, question: str) -> None:
        """Stream one chat, and keep its last data line exactly as it came."""
        request = client.chat.completions.with_streaming_response.create(
            **self._chat_arguments(question),
            stream=True,
            stream_options={"include_usage": True},
        )
        async with request as response:
            async for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                if chunk.get("usage") and not chunk["choices"]:
                    self.seen.last_chunk = line
                    usage = CompletionUsage.model_validate(chunk["usage"])
                    cost = chunk["usage"].get("cost")
                    self._note(CHAT, chunk["id"], usage, None if cost is None else f"{cost:.9f}")

    async def _leave(self, client: openai.AsyncOpenAI) -> None:
        """Leave in the middle of a stream, first and alone; again if that was too slow."""
        for _ in range(LEAVES_MAX):
            began_s = self._clock()
            await self._abandon(client)
            if self._clock() - began_s <= LEAVES_WITHIN_S:
                return

    async def _abandon(self, client: openai.AsyncOpenAI) -> None:
        """Read the beginning of a stream, and close it."""
        arguments = self._chat_arguments(QUESTIONS[1])
        # Without a limit the reply is as long as the model can make it, so even a slow client
        # leaves before its end.
        del arguments["max_tokens"]
        stream = await client.chat.completions.create(
            **arguments, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = 0
        async for chunk in stream:
            self.seen.abandoned_id = chunk.id
            chunks += 1
            if chunks == CHUNKS_READ:
                break
        await stream.close()

    # -- search-team ----------------------------------------------------------------------------

    async def _search(self, client: openai.AsyncOpenAI, question: str) -> None:
        self.seen.sent[SEARCH] += 1
        number = self.seen.sent[SEARCH]
        raw = await client.completions.with_raw_response.create(
            model=self._model,
            prompt=f"{LONG_TEXT}\nQuestion {number}: {question}\nAnswer:",
            max_tokens=SEARCH_TOKENS,
        )
        reply = raw.parse()
        self._note(SEARCH, reply.id, reply.usage, raw.headers.get("x-cost-meter-cost-usd"))

    # -- batch-team -----------------------------------------------------------------------------

    async def _batch(self, folder: Path, environment: Mapping[str, str]) -> None:
        log, result = folder / "bench.log", folder / "bench.json"
        arguments = bench_command(
            Target(self._url, self._model, self._tokenizer),
            Shape(BATCH_INPUT_TOKENS, BATCH_OUTPUT_TOKENS),
            requests=BATCH_REQUESTS,
            requests_per_s=BATCH_REQUESTS_PER_SECOND,
            result=result,
        )
        with log.open("wb") as out:
            process = await asyncio.create_subprocess_exec(
                *arguments,
                env={**environment, "OPENAI_API_KEY": self._keys[BATCH]},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if status != 0 or not result.exists():
            raise ServerError(f"`vllm bench serve` ended with status {status}; {end_of(log)}")
        self.seen.batch = json.loads(result.read_text())
        self.seen.sent[BATCH] = BATCH_REQUESTS
        self._batch_done.set()

    def _note(
        self, tenant: str, response_id: str, usage: CompletionUsage | None, cost_usd: str | None
    ) -> None:
        if usage is None:
            raise ServerError(f"the reply {response_id} has no usage")
        details = usage.prompt_tokens_details
        self.seen.told.append(
            Told(
                tenant=tenant,
                response_id=response_id,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=details.cached_tokens if details else None,
                output_tokens=usage.completion_tokens,
                cost_usd=cost_usd,
            )
        )
