"""Does attention's reading overlap with arithmetic? A test of the form of the cost model.

Some decodes of short context run, then a few of very long context, and into both comes a prefill of
the same chunk from time to time. The server's step log has the time of each step and what was in
it. The chunk adds some time to a step of either kind. If decodes and prefills were computed one
after another, it would add the same to both. If long contexts are read while the chunk computes, it
adds less beside them. Each form of the cost model predicts its own difference.

Each form has been learnt from the same steps, and one of them is in use. A prediction is v(all) of
the step's game, by the twin of the native code.

A step with a chunk is compared with the steps without one just before and after it, so contexts
that grow and a machine that warms up cancel. Figures are medians, as a step that is held up is only
ever longer; their intervals are those of the sign test, which assumes no distribution.

Invariant: a step counts only if the log says that exactly these requests were in it.
"""

import http.client
import json
import math
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict
from math import comb
from statistics import fmean, median
from typing import Any, NamedTuple

from vllm_cost_meter.attribution.cost_model import (
    CURVE,
    RAMPS,
    TWO_PLANES,
    Experts,
    Layers,
    Plane,
    ServedModel,
)
from vllm_cost_meter.attribution.features_py import StepPart
from vllm_cost_meter.attribution.game_py import StepModel, solve_step
from vllm_cost_meter.engine.step_log import LoggedStep
from vllm_cost_meter.errors import ServerError
from vllm_cost_meter.lab.gpu_check.mixed import random_prompt
from vllm_cost_meter.lab.gpu_check.model import NAME
from vllm_cost_meter.lab.gpu_check.plan import OverlapSize
from vllm_cost_meter.lab.gpu_check.served import Checked
from vllm_cost_meter.lab.server import LOOPBACK
from vllm_cost_meter.lab.validation.replay import read_log
from vllm_cost_meter.ledger.queries.cost_models import CURVE_NAMES, TERM_NAMES

SHORT, LONG = "short", "long"
REQUEST_TIMEOUT_S = 300
# The log reaches the disk within a second while steps come.
LOG_DELAY_S = 1.2
# A step with a chunk is compared with up to so many before it, and as many after.
AROUND = 4
CHUNK_STEPS_MIN = 4
TAIL = 0.025
# With fewer values no interval of the sign test has 95 %.
VALUES_MIN = 6
# Long contexts must be at least so many times as much to read as short ones, or both are alike.
READ_TIMES_MIN = 2


class Spread(NamedTuple):
    """A median with its 95 % interval, in GPU-ns, and how many values it is of."""

    median_ns: float
    low_ns: float
    high_ns: float
    values: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the median of some values.

        With fewer than `VALUES_MIN` the interval is their range, which is less than 95 %.
        """
        ordered = sorted(values)
        # The most values that may be left out on each side.
        below, place = 0.0, 0
        for number in range(len(ordered) // 2):
            below += comb(len(ordered), number) / 2 ** len(ordered)
            if below > TAIL:
                break
            place = number
        return cls(median(ordered), ordered[place], ordered[-1 - place], len(ordered))


class ChunkSteps(NamedTuple):
    """Steps of one kind of decodes: those with a chunk, and for each the time without."""

    decodes: int
    context: int
    chunk: int
    with_ns: list[int]
    without_ns: list[float]

    @property
    def added_ns(self) -> list[float]:
        """What each chunk added to its step."""
        return [a - b for a, b in zip(self.with_ns, self.without_ns, strict=True)]

    def parts(self, *, chunk: bool) -> list[StepPart]:
        """Return what such a step computes, as the cost model sees it."""
        decodes = [StepPart(1, self.context, False)] * self.decodes
        return [*decodes, *([StepPart(self.chunk, self.chunk, True)] if chunk else [])]


def measure_overlap(
    checked: Checked, size: OverlapSize, seed: int, on_phase: Callable[[str], None]
) -> dict[str, Any]:
    """Measure both kinds of steps, and what the forms predict; ready for JSON.

    Raises ServerError if steps with a chunk did not come about.
    """
    size = fitted(size, checked.context_max(), checked.kv_tokens())
    before = _model(checked)
    rng = random.Random(f"overlap {seed}")  # noqa: S311 - no secret
    found = {}
    for name, (decodes, context) in ((SHORT, size.short), (LONG, size.long)):
        on_phase(f"{decodes} decodes at {context} tokens, with a chunk of {size.chunk} and without")
        began_ns, ended_ns = _play(checked, size, decodes, context, rng)
        time.sleep(LOG_DELAY_S)
        if checked.step_log is None:
            raise ServerError("expected a step log of this server, got none")
        steps = [s for s in read_log(checked.step_log) if began_ns <= s.unix_ns <= ended_ns]
        found[name] = chunk_steps(steps, decodes, size.chunk)
    return answer(found, before, _model(checked)) | {"size": asdict(size)}


def fitted(size: OverlapSize, context_max: int, kv_tokens: int | None) -> OverlapSize:
    """Return the size with contexts that a server has room for. Raises ServerError without room."""
    fitting = size.fitting(context_max, kv_tokens)
    (decodes, tokens), (few, long) = fitting.short, fitting.long
    if few * long < READ_TIMES_MIN * decodes * tokens:
        raise ServerError(
            f"expected room for {few} contexts of {READ_TIMES_MIN * decodes * tokens // few} tokens"
            f" or more, got {long}: give the KV cache more memory, or take a smaller --shape"
        )
    return fitting


def _model(checked: Checked) -> Mapping[str, Any]:
    models = checked.judged.ask("models")["models"]
    if not models:
        raise ServerError("expected a cost model at /cost/models, got none")
    model: Mapping[str, Any] = models[0]
    return model


def chunk_steps(steps: Sequence[LoggedStep], decodes: int, chunk: int) -> ChunkSteps:
    """Return the steps of so many decodes, with a whole prompt of `chunk` tokens and without.

    Raises ServerError if there are too few with one.
    """
    plain = [_is_plain(step, decodes) for step in steps]
    contexts: list[float] = []
    with_ns: list[int] = []
    without_ns: list[float] = []
    for place, step in enumerate(steps):
        if not _has_chunk(step, decodes, chunk):
            continue
        near = range(max(0, place - AROUND), min(len(steps), place + AROUND + 1))
        around = [steps[other].gpu_time_ns for other in near if plain[other]]
        if around:
            with_ns.append(step.gpu_time_ns)
            without_ns.append(float(median(around)))
            contexts.append(fmean(p.position + 1 for p in step.parts if p.tokens == 1))
    if len(with_ns) < CHUNK_STEPS_MIN:
        raise ServerError(
            f"expected {CHUNK_STEPS_MIN} steps or more of {decodes} decodes and a chunk of {chunk},"
            f" got {len(with_ns)} in {len(steps)} steps: does a step take so many tokens"
            " (--max-num-batched-tokens)?"
        )
    return ChunkSteps(decodes, round(fmean(contexts)), chunk, with_ns, without_ns)


def _is_plain(step: LoggedStep, decodes: int) -> bool:
    return len(step.parts) == decodes and all(
        part.tokens == 1 and part.position >= part.prompt_tokens for part in step.parts
    )


def _has_chunk(step: LoggedStep, decodes: int, chunk: int) -> bool:
    chunks = [part for part in step.parts if part.tokens == chunk and part.position == 0]
    rest = [part for part in step.parts if part not in chunks]
    return len(chunks) == 1 and _is_plain(step._replace(parts=rest), decodes)


def answer(
    found: Mapping[str, ChunkSteps], before: Mapping[str, Any], after: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the measured steps, and what each form predicts for them, ready for JSON.

    `before` and `after` are the cost models published before these steps and after them.
    """
    short, long = (Spread.of(found[name].added_ns) for name in (SHORT, LONG))
    less_ns = short.median_ns - long.median_ns
    noise_ns = math.hypot(*((spread.high_ns - spread.low_ns) / 2 for spread in (short, long)))
    return {
        "steps": {name: _shown(steps) for name, steps in found.items()},
        # What the chunk adds less beside long contexts than beside short ones.
        "less_ns": less_ns,
        "less_noise_ns": noise_ns,
        "predicted": {
            when: {
                "form_in_use": model["form"],
                "version": model["version"],
                **_by_form(found, model),
            }
            for when, model in (("before", before), ("after", after))
        },
    }


def _shown(steps: ChunkSteps) -> dict[str, Any]:
    return {
        "decodes": steps.decodes,
        "context": steps.context,
        "chunk": steps.chunk,
        "without": Spread.of(steps.without_ns)._asdict(),
        "with": Spread.of([float(ns) for ns in steps.with_ns])._asdict(),
        "added": Spread.of(steps.added_ns)._asdict(),
        "with_ns": steps.with_ns,
        "without_ns": steps.without_ns,
    }


def _by_form(found: Mapping[str, ChunkSteps], model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the four steps as each form predicts them, its mean error, and the difference."""
    forms = {}
    for name, form in forms_of(model).items():
        four = {
            kind: {
                which: predicted_ns(form, steps.parts(chunk=which == "with"))
                for which in ("without", "with")
            }
            for kind, steps in found.items()
        }
        measured = {
            kind: {"without": median(steps.without_ns), "with": median(steps.with_ns)}
            for kind, steps in found.items()
        }
        errors = [
            abs(ns / measured[kind][which] - 1) for kind in four for which, ns in four[kind].items()
        ]
        added = {kind: both["with"] - both["without"] for kind, both in four.items()}
        forms[name] = {
            **four,
            "mean_error": fmean(errors),
            "less_ns": added[SHORT] - added[LONG],
        }
    return {"forms": forms}


def forms_of(model: Mapping[str, Any]) -> dict[str, StepModel]:
    """Return both forms of a model, by name, from its row in `/cost/models`."""
    forms: dict[str, StepModel] = {}
    if (curve := model["curve"]) is not None and curve["form"] == CURVE:
        coefficients = (
            *(curve["terms"][name] for name in CURVE_NAMES[CURVE]),
            *(curve["token_ns"][str(begin)] for begin in RAMPS),
            curve["expert_ns"],
        )
        served = ServedModel(
            Experts(**curve["experts"]), Layers(**curve["layers"]), tuple(curve["captured"])
        )
        forms[CURVE] = StepModel.of_curve(coefficients, served)
    compute, memory = (_plane(model["planes"][name]) for name in ("compute", "memory"))
    forms[TWO_PLANES] = StepModel.of_planes(compute, memory)
    return forms


def predicted_ns(form: StepModel, parts: Sequence[StepPart]) -> float:
    """Return the GPU-ns of a step of these parts: tokens, context at its end, is it a prefill."""
    return solve_step(form, parts).total_ns


def _plane(terms: Mapping[str, float]) -> Plane:
    one, token, sequence, product, context = (terms[name] for name in TERM_NAMES)
    return (one, token, sequence, product, context)


def _play(
    checked: Checked, size: OverlapSize, decodes: int, context: int, rng: random.Random
) -> tuple[int, int]:
    """Let the decodes run and send chunks into them; return from when to when, in Unix ns."""
    server = checked.judged
    started = [threading.Event() for _ in range(decodes)]
    with ThreadPoolExecutor(decodes) as pool:
        replies = [
            pool.submit(
                _stream, checked.server.port, random_prompt(rng, context), size.output_tokens, event
            )
            for event in started
        ]
        for event in started:
            event.wait(REQUEST_TIMEOUT_S)
        began_ns = time.time_ns()
        for number in range(size.chunks):
            time.sleep(size.pause_s)
            if any(reply.done() for reply in replies):
                break
            prompt = random_prompt(rng, size.chunk)
            server.complete(f"gpu-check-chunk-{decodes}-{number}", prompt, 1)
        # Steps that come after these have no part in it.
        time.sleep(size.pause_s)
        ended_ns = time.time_ns()
        for reply in replies:
            reply.result()
    return began_ns, ended_ns


def _stream(port: int, prompt: Sequence[int], output_tokens: int, started: threading.Event) -> None:
    """Ask for a stream, say when its first token came, and read it to its end.

    Raises ServerError.
    """
    body = {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": output_tokens,
        "ignore_eos": True,
        "stream": True,
    }
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=REQUEST_TIMEOUT_S)
    try:
        with closing(connection):
            headers = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body), headers)
            reply = connection.getresponse()
            if reply.status != http.client.OK:
                raise ServerError(f"/v1/completions answered {reply.status}: {reply.read(200)!r}")
            reply.readline()
            started.set()
            reply.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"a stream of vLLM broke off: {error!r}") from None
    finally:
        started.set()  # Nobody waits for one that failed.
