"""The work behind the command `validate`: run the simulations, and build the answer.

`--json` prints the answer as it is. Loading this module loads neither numpy nor vLLM, and a replay
does not need them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import Progress

from vllm_cost_meter.attribution import METHODS
from vllm_cost_meter.errors import DependencyError
from vllm_cost_meter.lab.validation.replay import replay
from vllm_cost_meter.units.text import plain

if TYPE_CHECKING:
    from vllm_cost_meter.attribution.priors import Prior
    from vllm_cost_meter.lab.validation.real_server.session import ServerPlan
    from vllm_cost_meter.lab.validation.traffic import Trace

T = TypeVar("T")

MEAN_BATCHES = (10, 60, 160)
LEAVE_ONE_OUT = "leave-one-out"
# Of the steps of a roofline's trace, this part comes before any comparison.
WARM_UP_PART = 1 / 3


@dataclass(frozen=True, slots=True)
class KernelPlan:
    """The scenarios to simulate kernel by kernel; without names, all of them.

    Every `every`-th step that is judged is compared with a truth from twice `permutations` random
    orders.
    """

    scenarios: Sequence[str] = ()
    every: int = 10
    permutations: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True)
class RooflinePlan:
    """The rooflines to simulate. Empty `gpus`, `models` or `mean_batches` mean all of them.

    Each trace has `steps` steps. After the warm-up, every `every`-th step is compared with a truth
    from twice `permutations` random orders.
    """

    gpus: Sequence[str] = ()
    models: Sequence[str] = ()
    mean_batches: Sequence[int] = ()
    steps: int = 30_000
    every: int = 10
    permutations: int = 1_000
    seed: int = 0


def judge(plan: KernelPlan) -> dict[str, Any]:
    """Return each method's errors in each scenario, by its name.

    Raises ValueError for an unknown scenario, and DependencyError without numpy or vLLM.
    """
    with _vllm_and_numpy():
        # numpy comes with vLLM; neither is a dependency of the meter itself.
        from vllm_cost_meter.lab.validation.scenarios import SCENARIOS  # noqa: PLC0415

        # Names are checked before vLLM is loaded, which takes seconds.
        chosen = [_named("--scenario", name, SCENARIOS) for name in plan.scenarios or SCENARIOS]
        from vllm_cost_meter.lab.validation.vllm_work import production_prior  # noqa: PLC0415
    answer = {}
    steps = sum(scenario.learnt + scenario.judged for scenario in chosen)
    with _progress("steps", steps) as on_step:
        for scenario in chosen:
            trace = scenario.trace(plan.seed)
            prior = scenario.prior(production_prior(scenario.shape, scenario.machine.gpu))
            answer[scenario.name] = _compared(
                trace, prior, scenario.learnt, plan.every, plan.permutations, plan.seed, on_step
            )
    return answer


def fit_roofline(plan: RooflinePlan) -> dict[str, Any]:
    """Return each method's errors against each roofline, by "GPU/model/mean batch".

    Raises ValueError for an unknown GPU or model, and DependencyError without numpy or vLLM.
    """
    with _vllm_and_numpy():
        from vllm_cost_meter.lab.validation.roofline import GPUS, MODELS, Machine  # noqa: PLC0415

        gpus = [_named("--gpu", name, GPUS) for name in plan.gpus or GPUS]
        models = [_named("--model", name, MODELS) for name in plan.models or MODELS]
        from vllm_cost_meter.lab.validation.traffic import Load, make_trace  # noqa: PLC0415
        from vllm_cost_meter.lab.validation.vllm_work import step_work  # noqa: PLC0415
    batches = plan.mean_batches or MEAN_BATCHES
    learnt = int(plan.steps * WARM_UP_PART)
    answer = {}
    with _progress("steps", len(gpus) * len(models) * len(batches) * plan.steps) as on_step:
        for model in models:
            work = step_work(model)
            for gpu in gpus:
                machine = Machine(gpu, work)
                for mean_batch in batches:
                    trace = make_trace(machine, Load(mean_batch), plan.steps, plan.seed)
                    found = _compared(
                        trace,
                        machine.prior(),
                        learnt,
                        plan.every,
                        plan.permutations,
                        plan.seed,
                        on_step,
                    )
                    needed = work.weight_bytes + work.kv_bytes * trace.kv_tokens_max
                    found["memory"] = {"needed_bytes": needed, "gpu_bytes": gpu.memory_bytes}
                    answer[f"{gpu.name}/{model.name}/{mean_batch}"] = found
    return answer


def games(seed: int) -> dict[str, Any]:
    """Return what each game brings a client, by its name. Raises DependencyError without numpy."""
    with _vllm_and_numpy():
        from vllm_cost_meter.lab.validation.gaming import answer  # noqa: PLC0415
    return answer(seed)


@contextmanager
def _vllm_and_numpy() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise DependencyError(
            f"validate: expected vLLM, for its counts of FLOPs and bytes, got: {error}; install"
            " vLLM beside the meter, or replay a log with --step-log, which needs no vLLM"
        ) from None


def measured(plan: "ServerPlan") -> dict[str, Any]:
    """Return the verdict on a real server and its figures. Raises ServerError."""
    from vllm_cost_meter.lab.validation.real_server.session import measure  # noqa: PLC0415 - as `validate`

    console = Console(stderr=True)
    return measure(plan, lambda phase: console.print(plain(phase), markup=False, highlight=False))


def replayed(path: Path) -> dict[str, Any]:
    """Return the differences between the methods on a step log. Raises StepLogError."""
    with _progress("steps", None) as on_step:
        found = replay(path, on_step)
    header = found.header
    return {
        "step_log": {
            "model": header.model,
            "vllm_version": header.vllm_version,
            "run_id": header.run_id,
            "gpus": header.gpus,
            "steps": found.steps,
            "requests": found.requests_seen,
            "gpu_time_ns": found.gpu_time_ns,
        },
        "methods": {
            method: {
                "charged_ns": found.charged_ns[method],
                "differences": {
                    other: asdict(difference) for other, difference in differences.items()
                },
            }
            for method, differences in found.differences.items()
        },
        "requests": found.requests,
    }


def _compared(
    trace: "Trace",
    prior: "Prior",
    learnt: int,
    every: int,
    permutations: int,
    seed: int,
    on_step: Callable[[], None],
) -> dict[str, Any]:
    """Compare all methods on a trace."""
    # This module needs numpy: see `judge`.
    from vllm_cost_meter.lab.validation.compare import LeaveOneOut, MeterSplitter, Splitter, compare  # noqa: PLC0415

    splitters: dict[str, Splitter] = {name: MeterSplitter(name, trace, prior) for name in METHODS}
    splitters[LEAVE_ONE_OUT] = LeaveOneOut()
    found = compare(
        trace,
        splitters,
        learnt=learnt,
        every=every,
        permutations=permutations,
        seed=seed,
        on_step=on_step,
    )
    return {
        "mean_batch": trace.mean_batch,
        "requests_per_s": trace.requests_per_s,
        "steps": len(trace.steps),
        "compared_steps": found.compared_steps,
        "requests": found.compared_requests,
        "noise": asdict(found.noise),
        "truth": {
            "outside_interval_share": found.truth.outside_interval_share,
            "outside_interval_parts_share": found.truth.outside_interval_parts_share,
        },
        "methods": {method: asdict(errors) for method, errors in found.methods.items()},
    }


def _named(option: str, name: str, known: Mapping[str, T]) -> T:
    if name not in known:
        raise ValueError(f"{option}: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


@contextmanager
def _progress(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step; on a terminal, a progress bar shows the steps."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
