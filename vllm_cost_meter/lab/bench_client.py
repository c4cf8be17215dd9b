"""The client of `vllm bench serve` in one process for many runs.

The client imports for seconds before its first request, so a comparison of many short runs starts
it once. `python -m vllm_cost_meter.lab.bench_client LOG` reads a list of arguments per line of
standard input and answers each with a line of JSON; what the client prints goes to LOG. It ends
with its standard input, so it does not outlive the process that started it.

Invariant: a run is returned only if every request of it was answered.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.server import end_of
from vllm_cost_meter.lab.sweep.bench import Shape, Target

# A run of a few seconds that takes longer than this hangs.
RUN_TIMEOUT_S = 600
STOP_TIMEOUT_S = 10
FAILURES_SHOWN = 3
PERCENTILES = "50,99"


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """A run: so many requests of a shape, so many of them at a time."""

    shape: Shape
    requests: int
    concurrency: int

    def arguments(self, target: Target, seed: int) -> list[str]:
        """Return the arguments of `vllm bench serve`. Runs with the same seed send the same."""
        return [
            *("--dataset-name", "random", "--base-url", target.url),
            *("--model", target.model, "--tokenizer", target.tokenizer),
            *("--seed", str(seed), "--num-prompts", str(self.requests), "--ignore-eos"),
            *("--random-input-len", str(self.shape.input_tokens)),
            *("--random-output-len", str(self.shape.output_tokens)),
            *("--max-concurrency", str(self.concurrency), "--disable-tqdm"),
            *("--percentile-metrics", "ttft,tpot,itl", "--metric-percentiles", PERCENTILES),
            *("--ready-check-timeout-sec", "0", "--save-detailed"),  # errors are a detail
        ]


class BenchClient:
    """The client's process. Use it in a `with` block: at its end the process is gone."""

    def __init__(self, environment: Mapping[str, str], log: Path) -> None:
        """Start it; it imports vLLM at its first run. Its output is appended to `log`."""
        self._log = log
        log.touch()
        self._process = subprocess.Popen(  # noqa: S603 - our own command
            [sys.executable, "-m", "vllm_cost_meter.lab.bench_client", str(log)],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._into = cast(IO[bytes], self._process.stdin)
        self._out = cast(IO[bytes], self._process.stdout)

    def __enter__(self) -> "BenchClient":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._into.close()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._out.close()

    def run(self, target: Target, load: ClosedLoop, seed: int) -> dict[str, Any]:
        """Send a run's requests and return the measurements of `vllm bench serve`.

        Raises ServerError if the client fails or a request is not answered.
        """
        measured = self._ask(load.arguments(target, seed))
        if why := measured.get("failed_with"):
            raise ServerError(f"the client failed: {why}; {end_of(self._log)}")
        if measured["completed"] != load.requests:
            errors = {error.strip().splitlines()[-1] for error in measured["errors"] if error}
            shown = "; ".join(sorted(errors)[:FAILURES_SHOWN]) or "no error reported"
            raise ServerError(
                f"expected {load.requests} answered requests at {target.url}, got"
                f" {measured['completed']}: {shown}"
            )
        return measured

    def _ask(self, arguments: Sequence[str]) -> dict[str, Any]:
        # Killed, it closes its output, and the wait for a line is over.
        watch = threading.Timer(RUN_TIMEOUT_S, self._process.kill)
        watch.start()
        try:
            self._into.write(json.dumps(arguments).encode() + b"\n")
            self._into.flush()
            line = self._out.readline()
        except OSError:
            line = b""
        finally:
            watch.cancel()
        if not line:
            raise ServerError(f"the client ended without an answer; {end_of(self._log)}")
        measured: dict[str, Any] = json.loads(line)
        return measured


def main(log: Path) -> None:
    """Answer one line of arguments after another, until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for line in sys.stdin:
        try:
            measured = _measured(json.loads(line))
        except (Exception, SystemExit) as error:
            measured = {"failed_with": repr(error)}
        print(json.dumps(measured), file=answers, flush=True)


def _measured(arguments: Sequence[str]) -> dict[str, Any]:
    from vllm.benchmarks import serve  # noqa: PLC0415 - ten seconds, the first time

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    measured: dict[str, Any] = serve.main(parser.parse_args(arguments))
    return measured


if __name__ == "__main__":
    main(Path(sys.argv[1]))
