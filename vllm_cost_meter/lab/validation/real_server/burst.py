"""Send bursts to a metered server, one at a time, and read the bills that prove what ran.

An engine with nothing to do starts a step as soon as one request is there, and would start without
the others. So a request of its own goes ahead of each burst: while the engine computes its prompt,
the players arrive, and all of them start in the next step. It makes one token, is alone in its
step, and has a bill of its own: nothing of it is in the game. Where it was too short, or did not
come first, the burst is repeated behind a longer one, or one that has a longer start. Every prompt
is random and sent once, so no prefix cache helps.

Invariant: at most one burst is on its way. The server's GPU time over a round is that of our bills,
to the nanosecond; else the server worked for others, and the round raises ServerError.
"""

import json
import random
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from vllm_cost_meter.errors import ServerError, StatusError
from vllm_cost_meter.lab.client import get_json, post_json
from vllm_cost_meter.lab.validation.real_server.players import (
    PlayerBill,
    PlayingRequest,
    members_of,
    problem_of,
)

# Every language model's tokenizer has these ids, and none of them ends the text.
TOKEN_IDS = range(100, 400)
REQUEST_TIMEOUT_S = 600
SIDE_TIMEOUT_S = 60
SIDE = "the side endpoint of a metered server"
# A bill is in the ledger a fraction of a second after the reply; a busy machine takes longer.
BILL_TIMEOUT_S = 60
LOOK_EVERY_S = 0.05
# The request ahead has as many prompt tokens at first, and twice as many where others came late.
AHEAD_TOKENS = 512
# It leaves before the others by so much, and by twice as much where it did not come first.
AHEAD_S = 0.005
# Requests of few tokens often come too late on a busy machine; a try of one burst takes a second.
TRIES = 20
# If more than this part of a round's bursts fails, the next rounds begin with the other start.
FAILED_PART = 0.2
NOT_FOUND, UNAVAILABLE = 404, 503
# What the engine does for requests; the rest of a run's time is nobody's.
FOR_REQUESTS = ("requests_ns", "in_flight_ns", "tail_ns")


@dataclass(frozen=True, slots=True)
class JudgedServer:
    """A metered server: vLLM's URL and key, the side endpoint's URL and token, and the model."""

    url: str
    key: str | None
    side_url: str
    token: str | None
    model: str

    def complete(self, request_id: str, prompt: Sequence[int], output_tokens: int) -> None:
        """Have a prompt of token ids completed. Raises ServerError."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        headers = {"x-request-id": request_id}
        url = f"{self.url}/v1/completions"
        post_json(url, self.key, json.dumps(body).encode(), headers, REQUEST_TIMEOUT_S)

    def part_of(self, request_id: str) -> dict[str, Any]:
        """Wait for the bill of a request, and return its only part. Raises ServerError."""
        deadline = time.monotonic() + BILL_TIMEOUT_S
        while True:
            try:
                row = self.ask(f"requests/{request_id}")
                if row["state"] == "finished" and len(row["parts"]) == 1:
                    part: dict[str, Any] = row["parts"][0]
                    return part
            except StatusError as error:
                if error.status != NOT_FOUND:
                    raise
            if time.monotonic() > deadline:
                raise ServerError(
                    f"expected a bill of {request_id} at {self.side_url} within {BILL_TIMEOUT_S} s,"
                    " got none; see whether the side endpoint is that of this server, with"
                    " vllm-cost-meter doctor"
                )
            time.sleep(LOOK_EVERY_S)

    def run(self, run_id: str) -> dict[str, Any]:
        """Return what the side endpoint says of an engine run. Raises ServerError."""
        for run in self.ask("summary?window=1h")["runs"]:
            if run["run_id"] == run_id:
                found: dict[str, Any] = run
                return found
        raise ServerError(f"expected the run {run_id} in {self.side_url}/cost/summary, got others")

    def used_ns(self, run_id: str) -> int:
        """Return the GPU-ns that an engine run has worked for requests until now."""
        for run in self.ask("audit")["runs"]:
            if run["run_id"] == run_id:
                return sum(run[name] for name in FOR_REQUESTS)
        raise ServerError(f"expected the run {run_id} in {self.side_url}/cost/audit, got others")

    def ask(self, path: str) -> dict[str, Any]:
        """GET an answer from the side endpoint below `/cost/`, and wait while it is not ready.

        Raises ServerError.
        """
        url = f"{self.side_url}/cost/{path}"
        deadline = time.monotonic() + BILL_TIMEOUT_S
        while True:
            try:
                return get_json(url, self.token, SIDE, SIDE_TIMEOUT_S, dict[str, Any])
            except StatusError as error:
                if error.status != UNAVAILABLE or time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_EVERY_S)


@dataclass(frozen=True, slots=True)
class _Start:
    """How a burst begins: the prompt tokens of the request ahead, and how long it is alone."""

    tokens: int
    alone_s: float

    def after(self, ahead: Mapping[str, Any], tokens_max: int) -> "_Start":
        """Return the start to try after a failed one, from the part of its request ahead."""
        if ahead["batch"] > ahead["steps"]:
            return _Start(self.tokens, 2 * self.alone_s)
        return _Start(min(2 * self.tokens, tokens_max), self.alone_s)


@dataclass(frozen=True, slots=True)
class _Sent:
    """A burst that was answered: its coalition, its requests' ids, the one ahead first."""

    coalition: int
    request_ids: list[str]


class BurstPlayer:
    """Plays coalitions on one server, round by round."""

    def __init__(
        self, server: JudgedServer, players: Sequence[PlayingRequest], prompt_tokens: int, seed: int
    ) -> None:
        """Play the first burst. The request ahead has at most `prompt_tokens`: one step takes them.

        Raises ServerError if the server has more than one engine.
        """
        self.repeated = 0
        self._server, self._players = server, players
        self._prompt_tokens = prompt_tokens
        self._rng = random.Random(seed)  # noqa: S311 - no secret
        # New prompts in each run, whatever its seed: a running server has the earlier ones cached.
        self._tokens = random.Random()  # noqa: S311 - no secret
        self._start = _Start(min(AHEAD_TOKENS, prompt_tokens), AHEAD_S)
        self._session, self._bursts = f"validate-{secrets.token_hex(6)}", 0
        self.run_id = self._run_of_everybody()
        # What the engine has worked, if from now on it works for our bursts only.
        self._expected_ns = server.used_ns(self.run_id)

    def play_round(self, coalitions: Iterable[int]) -> dict[int, list[PlayerBill]]:
        """Play each coalition once, in random order; return its members' bills.

        Raises ServerError if the server worked for others, or bursts did not run together.
        """
        counted: dict[int, list[PlayerBill]] = {}
        waiting, start, problem = list(coalitions), self._start, ""
        for attempt in range(TRIES):
            self._rng.shuffle(waiting)
            bursts = [self._play(coalition, start) for coalition in waiting]
            failed, next_start = [], start
            for burst in bursts:
                ahead, *parts = [self._server.part_of(each) for each in burst.request_ids]
                self._expected_ns += sum(part["gpu_time_ns"] for part in (ahead, *parts))
                if found := problem_of(self._members(burst.coalition), parts):
                    problem = found
                    failed.append(burst.coalition)
                    next_start = start.after(ahead, self._prompt_tokens)
                else:
                    counted[burst.coalition] = [_bill(part) for part in parts]
            self._refuse_others()
            if not failed:
                return counted
            start = next_start
            if attempt == 0 and len(failed) > FAILED_PART * len(waiting):
                self._start = start
            self.repeated += len(failed)
            waiting = failed
        raise ServerError(
            f"expected all requests of a burst in the same steps, got none in {TRIES} tries:"
            f" {problem}; lower --prompt-tokens if a step of the server takes fewer"
            " (--max-num-batched-tokens), else raise both, which gives requests more time to arrive"
        )

    def _refuse_others(self) -> None:
        """Raise ServerError if the engine has worked for requests that are not ours."""
        others_ns = self._server.used_ns(self.run_id) - self._expected_ns
        if others_ns:
            raise ServerError(
                f"expected a server that serves nobody else, got {others_ns / 1e9:.3f} GPU-seconds"
                f" of other requests at {self._server.url} meanwhile: no verdict; validate when the"
                " server is idle"
            )

    def _run_of_everybody(self) -> str:
        """Let everybody play once, and return the engine run that served. Raises ServerError."""
        sent = self._play((1 << len(self._players)) - 1, self._start)
        parts = [self._server.part_of(request_id) for request_id in sent.request_ids]
        if len(runs := {part["run_id"] for part in parts}) > 1:
            raise ServerError(
                f"expected one engine, got {len(runs)} that took requests of one burst: validate a"
                " server without data parallelism"
            )
        return str(runs.pop())

    def _play(self, coalition: int, start: _Start) -> _Sent:
        """Send a burst and wait for its replies."""
        self._bursts += 1
        name = f"{self._session}-{self._bursts}"
        members = self._members(coalition)
        requests = [
            (f"{name}-ahead", self._prompt(start.tokens), 1),
            *(
                (f"{name}-{number}", self._prompt(player.prompt_tokens), player.output_tokens)
                for number, player in enumerate(members)
            ),
        ]
        with ThreadPoolExecutor(len(requests)) as pool:
            replies = [pool.submit(self._server.complete, *requests[0])]
            time.sleep(start.alone_s)
            replies += [pool.submit(self._server.complete, *request) for request in requests[1:]]
        for reply in replies:
            reply.result()
        return _Sent(coalition, [request_id for request_id, _, _ in requests])

    def _members(self, coalition: int) -> list[PlayingRequest]:
        return [self._players[number] for number in members_of(coalition, len(self._players))]

    def _prompt(self, tokens: int) -> list[int]:
        return self._tokens.choices(TOKEN_IDS, k=tokens)


def _bill(part: Mapping[str, Any]) -> PlayerBill:
    return PlayerBill(part["gpu_time_ns"], part["prefill_ns"], part["step_ns"])
