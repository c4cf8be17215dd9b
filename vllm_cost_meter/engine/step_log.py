"""The step log: a file with every engine step, its requests and its GPU time.

The file holds JSON lines. The first line names the format, its version, the model, vLLM's version,
the run and its GPUs. Each other line is a step:

    {"unix_ns":…,"gpu_time_ns":…,"new":[[number,"request id",prompt tokens],…],
     "parts":[[number,tokens,position],…],"features":[[place,LoRA,guided,encoder tokens],…]}

`position` is the place in the request's context where the step starts, and `tokens` is the number
of tokens that the step computes for it. `features` are those of the parts that have any, by their
place; the key is missing if none has, and in logs of earlier meters. The first step of a request in
a file names its id; later steps use a number, because ids are many times longer than the rest of a
part. The log has ids only, never a prompt or a reply.

The size is bounded. A file that reaches half of the maximum becomes FILE.1, which replaces an older
one. So the disk holds at most the maximum, and at least the latest half of it. A file has one
writer, so each engine needs its own file.

Steps reach the disk within `FLUSH_AFTER_NS` while steps come, and by `flush` when they stop. A
killed process loses the rest and leaves a torn last line, which the reader skips. A failed write
ends the log with one warning, because a full disk must not end the meter.

Invariant: a log never starts on a non-empty file that is not a step log.
"""

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from vllm_cost_meter.errors import StepLogError
from vllm_cost_meter.logs import meter_logger
from vllm_cost_meter.records.client_text import stored

logger = meter_logger()

FORMAT = "vllm-cost-meter-step-log"
VERSION = 1
# A step with 256 requests takes 3 kB, so this holds 90,000 such steps.
MAX_BYTES = 256 * 1024 * 1024
# A smaller file could not hold a step with a large batch.
MAX_BYTES_LEAST = 256 * 1024
BUFFER_BYTES = 64 * 1024
FLUSH_AFTER_NS = 1_000_000_000
# Number of requests whose numbers are remembered. Beyond it all are forgotten and named anew.
NAMES_MAX = 16_384
HEADER_BYTES_MAX = 64 * 1024

Count = Annotated[int, msgspec.Meta(ge=0)]


class StepLogHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The first line of a file. `gpus` is the factor between wall time and GPU time."""

    format: str
    version: int
    model: str
    vllm_version: str
    run_id: str
    gpus: Annotated[int, msgspec.Meta(ge=1)]


class LoggedPart(NamedTuple):
    """One request's part of a step: scheduled tokens, and where in its context they start."""

    request_id: str
    tokens: int
    position: int
    prompt_tokens: int
    has_lora: bool = False
    is_guided: bool = False
    encoder_tokens: int = 0


PlainPart = tuple[str, int, int, int]
# Place in the step, whether it has LoRA, whether it is guided, tokens that an encoder computes.
PartFeatures = tuple[int, bool, bool, int]
NO_FEATURES = (False, False, 0)


class LoggedStep(NamedTuple):
    """One step: the instant of its result, its GPU time, and its parts in scheduler order."""

    unix_ns: int
    gpu_time_ns: int
    parts: list[LoggedPart]


class _Line(msgspec.Struct, omit_defaults=True):
    unix_ns: Count
    gpu_time_ns: Count
    new: list[tuple[Count, str, Count]]
    parts: list[tuple[Count, Count, Count]]
    features: list[tuple[Count, bool, bool, Count]] = []


class StepLogWriter:
    """Appends the steps of one engine to a file. Use it from one thread of one process.

    `steps` counts written steps. `dropped` counts steps that were too large for a file or came
    after a failed write. Raises StepLogError, and overwrites nothing, if the file or FILE.1 exists
    and is not a step log.
    """

    def __init__(
        self,
        path: Path,
        *,
        model: str,
        vllm_version: str,
        run_id: str,
        gpus: int,
        max_bytes: int = MAX_BYTES,
        names_max: int = NAMES_MAX,
        flush_after_ns: int = FLUSH_AFTER_NS,
    ) -> None:
        if max_bytes < MAX_BYTES_LEAST:
            raise StepLogError(
                f"step log {path}: expected a maximum of at least {MAX_BYTES_LEAST} bytes,"
                f" got {max_bytes}"
            )
        self.steps = 0
        self.dropped = 0
        self._path = path
        self._file_max = max_bytes // 2
        self._names_max = names_max
        self._flush_after_ns = flush_after_ns
        self._encoder = msgspec.json.Encoder()
        self._header = StepLogHeader(
            format=FORMAT,
            version=VERSION,
            model=model,
            vllm_version=vllm_version,
            run_id=run_id,
            gpus=gpus,
        )
        try:
            for existing in (rotated(path), path):
                _check_is_ours(existing)
            if path.exists() and path.stat().st_size:
                path.replace(rotated(path))
            self._start_file()
        except OSError as error:
            raise StepLogError(f"step log {path}: cannot be written: {error}") from None

    def write(
        self,
        parts: Sequence[PlainPart],
        gpu_time_ns: int,
        unix_ns: int,
        features: Sequence[PartFeatures] = (),
    ) -> None:
        """Append a step. Never raises OSError; a failed write ends the log.

        This takes 52 microseconds for 256 requests. `parts` may be plain tuples with the fields of
        `LoggedPart`, because making a tuple is five times cheaper.
        """
        if self._file.closed:
            self.dropped += 1
            return
        try:
            self._write(parts, gpu_time_ns, unix_ns, features)
        except OSError as error:
            self.dropped += 1
            self._end(error)

    def flush(self) -> None:
        """Hand the buffered steps to the operating system. Never raises OSError, as `write`."""
        self._flushed_ns = time.monotonic_ns()
        if self._file.closed:
            return
        try:
            self._file.flush()
        except OSError as error:
            self._end(error)

    def close(self) -> None:
        """Flush and end the log; later steps are dropped."""
        try:
            self._file.close()
        except OSError as error:
            logger.warning("cost meter: step log %s lost its last steps: %s", self._path, error)

    def _end(self, error: OSError) -> None:
        logger.warning("cost meter: step log %s ends here: %s", self._path, error)
        self.close()

    def _write(
        self,
        parts: Sequence[PlainPart],
        gpu_time_ns: int,
        unix_ns: int,
        features: Sequence[PartFeatures],
    ) -> None:
        line = self._encode(parts, gpu_time_ns, unix_ns, features)
        if self._bytes + len(line) > self._file_max:
            self._file.close()
            self._path.replace(rotated(self._path))
            self._start_file()
            # Each file explains itself, so the new file names its requests anew.
            line = self._encode(parts, gpu_time_ns, unix_ns, features)
        if self._bytes + len(line) > self._file_max:
            self._numbers.clear()
            self.dropped += 1
            return
        self._file.write(line)
        self._bytes += len(line)
        self.steps += 1
        if time.monotonic_ns() - self._flushed_ns > self._flush_after_ns:
            self.flush()

    def _start_file(self) -> None:
        descriptor = os.open(
            self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
        )
        self._file = os.fdopen(descriptor, "wb", buffering=BUFFER_BYTES)
        header = self._encoder.encode(self._header) + b"\n"
        self._file.write(header)
        self._bytes = len(header)
        # The number and prompt tokens of each request id. A repeated id may be another request.
        self._numbers: dict[str, tuple[int, int]] = {}
        self._next_number = 0
        self.flush()

    def _encode(
        self,
        parts: Sequence[PlainPart],
        gpu_time_ns: int,
        unix_ns: int,
        features: Sequence[PartFeatures],
    ) -> bytes:
        if len(self._numbers) + len(parts) > self._names_max:
            self._numbers.clear()
        numbers = self._numbers
        new = []
        rows = []
        for request_id, tokens, position, prompt_tokens, *_ in parts:
            id = stored(request_id)
            named = numbers.get(id)
            if named is None or named[1] != prompt_tokens:
                named = numbers[id] = (self._next_number, prompt_tokens)
                self._next_number += 1
                new.append((named[0], id, prompt_tokens))
            rows.append((named[0], tokens, position))
        line = _Line(unix_ns, gpu_time_ns, new, rows, list(features))
        return self._encoder.encode(line) + b"\n"


def _check_is_ours(path: Path) -> None:
    """Raise StepLogError if there is something else than a step log, which must not be lost."""
    if not path.exists():
        return
    # Opening a FIFO would hold up the engine until somebody reads it.
    if not path.is_file():
        raise StepLogError(
            f"step log {path}: expected a file, got a folder, a FIFO or a device; name a file in"
            " COST_METER_STEP_LOG"
        )
    if path.stat().st_size:
        read_header(path)


def rotated(path: Path) -> Path:
    """Return the name of the older file of a log: FILE.1."""
    return path.with_name(path.name + ".1")


def read_header(path: Path) -> StepLogHeader:
    """Read the first line of a step log. Raises StepLogError if the file is not a step log."""
    try:
        with path.open("rb") as file:
            first = file.readline(HEADER_BYTES_MAX)
    except OSError as error:
        raise StepLogError(
            f"step log {path}: cannot be read: {error.strerror}; name a file that"
            " COST_METER_STEP_LOG wrote"
        ) from None
    try:
        header = msgspec.json.decode(first, type=StepLogHeader)
    except (msgspec.DecodeError, UnicodeDecodeError):
        header = None
    if header is None or header.format != FORMAT:
        raise StepLogError(
            f"step log {path}: expected a first line with the format {FORMAT!r}, got"
            f" {first[:60]!r}; name a file that COST_METER_STEP_LOG wrote"
        )
    if header.version != VERSION:
        raise StepLogError(
            f"step log {path}: expected version {VERSION}, got {header.version}; read it with the"
            " meter that wrote it"
        )
    return header


def files_of(path: Path) -> list[Path]:
    """Return the files of a log, oldest first: FILE.1 if it has the same run, then FILE."""
    header = read_header(path)
    older = rotated(path)
    if older.exists() and read_header(older).run_id == header.run_id:
        return [older, path]
    return [path]


def read_steps(path: Path) -> Iterator[LoggedStep]:
    """Yield the steps of one file in order; a torn last line is skipped.

    Raises StepLogError if the file is not a step log, or if a line in it is not a step.
    """
    read_header(path)
    decoder = msgspec.json.Decoder(_Line)
    requests: dict[int, tuple[str, int]] = {}
    with path.open("rb") as file:
        file.readline()
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                return
            try:
                logged = decoder.decode(line)
                requests.update((key, (name, prompt)) for key, name, prompt in logged.new)
                features = {place: rest for place, *rest in logged.features}
                parts = [
                    LoggedPart._make(
                        (
                            *(requests[key][0], tokens, position, requests[key][1]),
                            *features.get(place, NO_FEATURES),
                        )
                    )
                    for place, (key, tokens, position) in enumerate(logged.parts)
                ]
            except (msgspec.DecodeError, UnicodeDecodeError, KeyError) as error:
                why = f"unknown request number {error}" if isinstance(error, KeyError) else error
                raise StepLogError(
                    f"step log {path}, line {number}: expected a step, got {line[:60]!r} ({why});"
                    " the file is damaged: record it anew"
                ) from None
            yield LoggedStep(logged.unix_ns, logged.gpu_time_ns, parts)
