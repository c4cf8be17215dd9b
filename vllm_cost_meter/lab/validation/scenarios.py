"""The simulated servers that methods are judged on, kernel by kernel: models, GPUs, traffic.

Each has seven tenants at once, from chat to embeddings, on a model of the kinds that people serve.
The meter starts with the prior that it has in production, unless a scenario is about another one.

A name has the model's kind, the mean batch, and all that is unusual.

Invariant: a name says which server it is.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from vllm_cost_meter.attribution.cost_model import RAMPS, READ, SLOPES, Plane
from vllm_cost_meter.attribution.priors import Prior, curve_of_earlier, prior_without_counts
from vllm_cost_meter.lab.validation.feature_kernels import Encoder
from vllm_cost_meter.lab.validation.kernel_machine import Architecture, KernelMachine
from vllm_cost_meter.lab.validation.roofline import GPUS
from vllm_cost_meter.lab.validation.traffic import (
    SEVEN_TENANTS,
    Load,
    MachineChange,
    SimulatedTenant,
    Trace,
    make_trace,
)

# meta-llama/Llama-3.1-8B
DENSE = Architecture("llama-3.1-8b", 32, 4096, 32, 8, 128, 14_336, 128_256)
# google/gemma-3-12b: five of six layers see 1,024 tokens back.
WINDOWED = Architecture(
    *("gemma-3-12b", 48, 3840, 16, 8, 256, 15_360, 262_144), window=1_024, windowed_layers=40
)
# Qwen/Qwen3-30B-A3B
EXPERTS = Architecture(
    *("qwen3-30b-a3b", 48, 2048, 32, 4, 128, 768, 151_936), experts=128, experts_per_token=8
)
# deepseek-ai/DeepSeek-V2-Lite
LATENT = Architecture(
    *("deepseek-v2-lite", 27, 2048, 16, 16, 128, 1408, 102_400),
    experts=64,
    experts_per_token=6,
    shared_experts=2,
    latent=512,
    latent_rope=64,
    separate_prefills=True,
)
# Qwen/Qwen2-VL-7B-Instruct
VISION = Architecture(
    *("qwen2-vl-7b", 28, 3584, 28, 4, 128, 18_944, 152_064), encoder=Encoder(32, 1280, 16, 5120)
)
DRAFTS = replace(DENSE, name="llama-3.1-8b with 3 drafts", draft_tokens=3)
CHAT_AND_EMBEDDINGS = (
    SimulatedTenant("chat", 512, 256, 0.25),
    SimulatedTenant("embeddings", 256, 1, 0.75),
)
# One shape for long; then somebody comes with long prompts.
ONE_SHAPE = SimulatedTenant("chat", 512, 256, 0.95)
NEWCOMER = SimulatedTenant("newcomer", 8_192, 256, 0.05)
# Each beside the seven.
WITH_ADAPTER = SimulatedTenant("adapter", 512, 256, 0.06, adapter=1)
WITH_IMAGES = SimulatedTenant("images", 256, 128, 0.10, image_tokens=1_024)
WITH_GRAMMAR = SimulatedTenant("grammar", 512, 128, 0.10, has_grammar=True)
# Steps that the meter learns from before it is judged, and steps in which it is.
LEARNT, WITHOUT_PRIOR_LEARNT, JUDGED = 2_000, 4_000, 4_000
# What it may take to get over a change, and for how long it is judged then.
OVER_CHANGE, JUDGED_AFTER_CHANGE = 512, 1_024


@dataclass(frozen=True)
class Scenario:
    """A simulated server. `prior` makes the meter's prior of what production has.

    `learnt` steps go by before `judged` ones.
    """

    name: str
    shape: Architecture
    load: Load
    gpu: str = "h100"
    learnt: int = LEARNT
    judged: int = JUDGED
    prior: Callable[[Prior], Prior] = lambda production: production

    @property
    def machine(self) -> KernelMachine:
        """The machine, before any change."""
        return KernelMachine(GPUS[self.gpu], self.shape)

    def trace(self, seed: int, steps: int | None = None) -> Trace:
        """Return a trace of all of its steps, or of so many."""
        return make_trace(self.machine, self.load, steps or self.learnt + self.judged, seed)


def _usual(batch: int, draft_tokens: int = 0) -> Load:
    return Load(batch, SEVEN_TENANTS, draft_tokens)


def _beside(tenant: SimulatedTenant) -> Load:
    """Return a load with this tenant beside the seven, which share the rest of the requests."""
    rest = 1 - tenant.requests_share
    others = (replace(one, requests_share=one.requests_share * rest) for one in SEVEN_TENANTS)
    return Load(64, (*others, tenant))


def _nothing(production: Prior) -> Prior:
    return prior_without_counts(production.served)


def _scaled(terms: Collection[int], place: int, factor: float) -> Callable[[Prior], Prior]:
    """Return what makes an earlier fit of a prior, with some terms so many times larger.

    These are `terms` of its curve, and the one in a `place` of each plane.
    """

    def scale(plane: Plane) -> Plane:
        f, a, b, q, k = (
            value * factor if term == place else value for term, value in enumerate(plane)
        )
        return f, a, b, q, k

    def wrong(production: Prior) -> Prior:
        compute, memory = production.planes
        coefficients = tuple(
            value * factor if term in terms else value
            for term, value in enumerate(production.curve.start)
        )
        return replace(
            production,
            planes=(scale(compute), scale(memory)),
            curve=curve_of_earlier(coefficients) or production.curve,
            source="wrong",
        )

    return wrong


def _after_change(name: str, load: Load) -> Scenario:
    return Scenario(name, DENSE, load, learnt=8_000 + OVER_CHANGE, judged=JUDGED_AFTER_CHANGE)


# Of tokens, and of contexts: terms of a curve, and the place in a plane.
_TOKENS, _CONTEXT = (range(SLOPES, SLOPES + len(RAMPS)), 1), ((READ,), 4)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        Scenario("dense-4", DENSE, _usual(4)),
        Scenario("dense-64", DENSE, _usual(64)),
        Scenario("dense-160", DENSE, _usual(160)),
        Scenario("dense-400", DENSE, _usual(400)),
        Scenario("dense-64-a100", DENSE, _usual(64), gpu="a100"),
        Scenario("dense-16-l4", DENSE, _usual(16), gpu="l4"),
        Scenario("dense-64-two-gpus", replace(DENSE, gpus=2), _usual(64)),
        Scenario("dense-64-separate-prefills", replace(DENSE, separate_prefills=True), _usual(64)),
        Scenario("windows-64", WINDOWED, _usual(64)),
        Scenario("drafts-64", DRAFTS, _usual(64, draft_tokens=3)),
        Scenario("lora-64", DENSE, _beside(replace(WITH_ADAPTER, first_step=1_000))),
        Scenario("lora-64-always", DENSE, _beside(WITH_ADAPTER)),
        Scenario("vision-64", VISION, _beside(WITH_IMAGES)),
        Scenario("guided-64", DENSE, _beside(WITH_GRAMMAR)),
        Scenario("experts-8", EXPERTS, _usual(8)),
        Scenario("experts-64", EXPERTS, _usual(64)),
        Scenario("experts-400", EXPERTS, _usual(400)),
        Scenario("experts-64-zipf", replace(EXPERTS, routing_exponent=1.0), _usual(64)),
        Scenario("latent-64", LATENT, _usual(64)),
        Scenario("experts-64-chat-and-embeddings", EXPERTS, Load(64, CHAT_AND_EMBEDDINGS)),
        *(
            Scenario(
                f"dense-{batch}-no-prior",
                DENSE,
                _usual(batch),
                learnt=WITHOUT_PRIOR_LEARNT,
                prior=_nothing,
            )
            for batch in (64, 160, 400)
        ),
        Scenario(
            "experts-64-no-prior",
            EXPERTS,
            _usual(64),
            learnt=WITHOUT_PRIOR_LEARNT,
            prior=_nothing,
        ),
        *(
            Scenario(
                f"dense-64-prior-{what}",
                DENSE,
                _usual(64),
                learnt=WITHOUT_PRIOR_LEARNT,
                prior=_scaled(terms, place, factor),
            )
            for what, (terms, place), factor in (
                ("tokens-x1.25", _TOKENS, 1.25),
                ("tokens-x4", _TOKENS, 4.0),
                ("tokens-x0.25", _TOKENS, 0.25),
                ("context-x20", _CONTEXT, 20.0),
            )
        ),
        _after_change(
            "dense-64-slower-arithmetic",
            Load(
                64,
                SEVEN_TENANTS,
                change=MachineChange(8_000, KernelMachine(GPUS["h100"], DENSE, slower=2.0)),
            ),
        ),
        _after_change(
            "dense-64-newcomer",
            Load(64, (ONE_SHAPE, replace(NEWCOMER, first_step=8_000))),
        ),
    )
}
