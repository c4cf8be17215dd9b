"""One run of `vllm bench serve`: its command, its process, and what it saved of each request.

The client is the one of the environment that runs this. Its clock is Linux's monotonic one, which
all processes of a machine share, so what it saw stands beside what was measured here meanwhile.
Each run has a seed of its own: the same random prompts again would come from the prefix cache.

Invariant: a run that is left, by an error or Ctrl-C, leaves no process behind.
"""

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.server import command_path, end_of
from vllm_cost_meter.lab.sweep.steady import Reply

STOP_TIMEOUT_S = 10
NEEDED = ("start_times", "ttfts", "itls", "input_lens", "output_lens", "errors")


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of each request: its prompt's, and its reply's."""

    input_tokens: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Return the shape of its words, such as 512:256. Raises ValueError for any other."""
        sizes = text.split(":")
        if len(sizes) != 2 or not all(s.isascii() and s.isdigit() and int(s) for s in sizes):
            raise ValueError(
                f"--shape: expected INPUT:OUTPUT tokens, such as 512:256, got {text!r}"
            )
        return cls(int(sizes[0]), int(sizes[1]))

    def __str__(self) -> str:
        return f"{self.input_tokens}:{self.output_tokens}"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the client sends: vLLM's URL, the model's name there, and its tokenizer."""

    url: str
    model: str
    tokenizer: str


def bench_command(
    target: Target,
    shape: Shape,
    *,
    requests: int,
    requests_per_s: float | None,
    result: Path,
    burstiness: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return the command that sends so many requests at a mean rate, or all at once if None."""
    rate = "inf" if requests_per_s is None else repr(requests_per_s)
    return [
        *(command_path("vllm"), "bench", "serve", "--backend", "openai"),
        *("--base-url", target.url, "--endpoint", "/v1/completions"),
        *("--model", target.model, "--tokenizer", target.tokenizer),
        *("--dataset-name", "random", "--ignore-eos", "--seed", str(seed)),
        *("--random-input-len", str(shape.input_tokens)),
        *("--random-output-len", str(shape.output_tokens)),
        *("--num-prompts", str(requests), "--request-rate", rate),
        *("--burstiness", repr(burstiness)),
        *("--ready-check-timeout-sec", "0", "--disable-tqdm"),
        *("--save-result", "--save-detailed"),
        *("--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def client_version() -> str:
    """Return the version of vLLM that the client is of."""
    try:
        return metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return "unknown"


class Bench:
    """A running client."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self._log = log
        with log.open("wb") as out:
            # The client gets its own session, so that a Ctrl-C at the terminal reaches us first.
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                arguments,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        """Return whether it runs. Raises ServerError if it failed."""
        status = self._process.poll()
        if status:
            raise ServerError(f"`vllm bench serve` ended with status {status}; {end_of(self._log)}")
        return status is None

    def stop(self) -> None:
        """End it and all that it started: at once, if it does not go by itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def running(arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[Bench]:
    """Run a client; at the end of the block it is gone."""
    bench = Bench(arguments, environment, log)
    try:
        yield bench
    finally:
        bench.stop()


def replies_of(result: Path) -> list[Reply]:
    """Return what a client saved of each request. Raises ServerError where it saved less."""
    try:
        saved: dict[str, Any] = json.loads(result.read_bytes())
    except (OSError, json.JSONDecodeError) as error:
        raise ServerError(f"expected what `vllm bench serve` saved in {result}: {error}") from None
    if missing := [name for name in NEEDED if name not in saved]:
        raise ServerError(
            f"expected {', '.join(missing)} in what `vllm bench serve` saved, got none;"
            " is this vLLM older than 0.27?"
        )
    found = []
    for sent_s, ttft_s, gaps_s, inputs, outputs, wrong in zip(
        *(saved[name] for name in NEEDED), strict=True
    ):
        if wrong or not outputs:
            found.append(Reply(sent_s, sent_s, inputs, 0, ()))
        else:
            found.append(Reply.of(sent_s, (inputs, outputs), ttft_s, gaps_s))
    return found


def now_s() -> float:
    """Return the instant, on the clock of the client's replies."""
    return time.perf_counter()
