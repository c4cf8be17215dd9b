"""Prometheus counters of what bills add up to: by tenant, model and LoRA adapter.

The API process that receives a bill counts it. This is right with several API servers too, because
prometheus_client sums over processes. Once `TENANT_LABELS_MAX` tenants have a label, all others
share the label `other`, and a metric counts their bills. Names that clients chose get at most half
of the labels, so a client that invents names cannot hide other tenants. Of models and adapters
there are labels for `MODEL_LABELS_MAX` each, and for `OWNERS_MAX` combinations with tenants; beyond
that a bill's model and adapter are `other`, and another metric counts it. Its tenant is not folded
by that, so sums by tenant stay right.

Invariant: the number of series is bounded, and every caller contains errors raised here.
"""

from collections import OrderedDict
from typing import NamedTuple

from prometheus_client import Counter

from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.records.requests import EngineRequest
from vllm_cost_meter.tenants.rules import OTHER
from vllm_cost_meter.units.time import NS_PER_SECOND

TENANT_LABELS_MAX = 1_000
CLIENTS_LABELS_MAX = TENANT_LABELS_MAX // 2
MODEL_LABELS_MAX = 100
OWNERS_MAX = 2_000
# Parts of one prompt are billed soon after one another.
_PROMPTS_MAX = 10_000
_NONE = ""

_OWNER = ["tenant", "model", "lora"]
GPU_SECONDS = Counter("cost_meter_gpu_seconds", "GPU time of billed requests", [*_OWNER, "phase"])
COST_USD = Counter("cost_meter_cost_usd", "Cost of billed requests", _OWNER)
TOKENS = Counter(
    "cost_meter_tokens",
    "Tokens of billed requests; those of a prompt are of one kind each",
    [*_OWNER, "kind"],
)
BILLS = Counter("cost_meter_bills", "Engine requests billed", ["tenant", "engine_status"])
TENANTS_FOLDED = Counter(
    "cost_meter_tenants_folded", f"Bills counted under {OTHER}: too many tenants for labels"
)
MODELS_FOLDED = Counter(
    "cost_meter_models_folded",
    f"Bills whose model and LoRA adapter are counted as {OTHER}: too many for labels",
)


class TenantLabels:
    """Chooses the label of a tenant: its name, or `other` once the names are too many."""

    def __init__(
        self, tenants_max: int = TENANT_LABELS_MAX, clients_max: int = CLIENTS_LABELS_MAX
    ) -> None:
        """Allow `tenants_max` names, of which clients may have chosen `clients_max`."""
        self.tenants: set[str] = set()
        # The labelled tenants whose names clients chose.
        self._choices: set[str] = set()
        self._tenants_max = tenants_max
        self._clients_max = clients_max

    def of(self, owner: Owner) -> str:
        """Return the label of an owner's tenant, and count a bill whose tenant has none."""
        tenant = owner.tenant
        if tenant in self.tenants:
            return tenant
        chosen = owner.is_clients_choice
        is_full = len(self.tenants) >= self._tenants_max
        if is_full or (chosen and len(self._choices) >= self._clients_max):
            TENANTS_FOLDED.inc()
            return OTHER
        self.tenants.add(tenant)
        if chosen:
            self._choices.add(tenant)
        return tenant


class _Tokens(NamedTuple):
    """The tokens of a bill, each counted once."""

    uncached: int
    cached: int
    external: int
    output: int


class _OwnerSeries:
    """The counters of one tenant, model and adapter; looking them up costs more than counting."""

    def __init__(self, labels: tuple[str, str, str]) -> None:
        self._labels = labels
        self._prefill = GPU_SECONDS.labels(*labels, "prefill")
        self._decode = GPU_SECONDS.labels(*labels, "decode")
        self._tokens = [
            TOKENS.labels(*labels, kind)
            for kind in ("prompt_uncached", "prompt_cached", "prompt_external", "output")
        ]
        # Made with the first cost: without a price there is no such series.
        self._cost_usd: Counter | None = None

    def count(self, part: EngineRequest, tokens: _Tokens) -> None:
        self._prefill.inc(part.bill.prefill_ns / NS_PER_SECOND)
        self._decode.inc(part.bill.decode_ns / NS_PER_SECOND)
        for counter, number in zip(self._tokens, tokens, strict=True):
            if number:
                counter.inc(number)
        if part.cost_nanousd is not None:
            if self._cost_usd is None:
                self._cost_usd = COST_USD.labels(*self._labels)
            self._cost_usd.inc(part.cost_nanousd / 1e9)


class BillCounts:
    """Counts bills under labels of which there are not too many. Used by one thread."""

    def __init__(
        self,
        tenants: TenantLabels | None = None,
        models_max: int = MODEL_LABELS_MAX,
        owners_max: int = OWNERS_MAX,
    ) -> None:
        """Allow so many models, so many adapters, and so many combinations with tenants."""
        self.tenants = TenantLabels() if tenants is None else tenants
        self._models_max = models_max
        self._owners_max = owners_max
        self._models = {_NONE}
        self._loras = {_NONE}
        self._series: dict[tuple[str, str, str], _OwnerSeries] = {}
        # The prompts of several parts whose tokens are counted, the oldest first.
        self._prompts: OrderedDict[str, None] = OrderedDict()

    def count(self, part: EngineRequest) -> None:
        """Count one billed engine request: GPU time, cost, tokens and status."""
        tenant = self.tenants.of(part.owner)
        BILLS.labels(tenant, part.bill.engine_status).inc()
        labels = tenant, part.model or _NONE, part.lora or _NONE
        series = self._series.get(labels) or self._of(*labels)
        series.count(part, self._tokens_of(part))

    def _of(self, tenant: str, model: str, lora: str) -> _OwnerSeries:
        is_known = self._is_known(self._models, model) and self._is_known(self._loras, lora)
        labels = tenant, model, lora
        if not is_known or len(self._series) >= self._owners_max:
            MODELS_FOLDED.inc()
            labels = tenant, OTHER, OTHER
        if labels not in self._series:
            self._series[labels] = _OwnerSeries(labels)
        return self._series[labels]

    def _is_known(self, names: set[str], name: str) -> bool:
        if name not in names and len(names) <= self._models_max:
            names.add(name)
        return name in names

    def _tokens_of(self, part: EngineRequest) -> _Tokens:
        bill = part.bill
        if not self._is_first_of_prompt(part):
            return _Tokens(0, 0, 0, bill.output_tokens)
        external = bill.external_tokens or 0
        uncached = bill.prompt_tokens - bill.cached_tokens - external
        return _Tokens(uncached, bill.cached_tokens, external, bill.output_tokens)

    def _is_first_of_prompt(self, part: EngineRequest) -> bool:
        """Return whether no other part of the prompt was counted: its tokens count once."""
        if part.prompt_group == part.bill.request_id:
            return True
        if part.prompt_group in self._prompts:
            return False
        self._prompts[part.prompt_group] = None
        if len(self._prompts) > _PROMPTS_MAX:
            self._prompts.popitem(last=False)
        return True


# Those of this process.
_COUNTS = BillCounts()


def count_bill(part: EngineRequest) -> None:
    """Count one billed engine request."""
    _COUNTS.count(part)
