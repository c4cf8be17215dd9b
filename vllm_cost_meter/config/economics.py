"""Economics settings: latency bounds (SLO), full load, and the file with API prices.

Invariant: no figure in the books depends on them, so they may change at any time.
"""

from pydantic import BaseModel, Field

from vllm_cost_meter.config import types as t
from vllm_cost_meter.economics import Declared

BOUND = "a number above 0, at most 1,000,000,000"


class EconomicsSettings(BaseModel):
    """The economics part of the settings."""

    slo_ttft_ms: t.Number | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="The longest time to the first token of a good request.",
        json_schema_extra=t.about(BOUND, "ms", live=True),
    )
    slo_tpot_ms: t.Number | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="The longest mean time for each further token of a good request.",
        json_schema_extra=t.about(BOUND, "ms", live=True),
    )
    slo_e2e_ms: t.Number | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="The longest time from arrival to end of a good request.",
        json_schema_extra=t.about(BOUND, "ms", live=True),
    )
    slo_percentile: t.Number = Field(
        default=99.0,
        gt=0,
        le=100,
        description="Percentage of all requests that must be good.",
        json_schema_extra=t.about("a number above 0, at most 100", "%", live=True),
    )
    saturation_output_tokens_per_s: t.Number | None = Field(
        default=None,
        gt=0,
        le=1e9,
        description="Output tokens per second at full load, measured on the whole deployment with "
        "this model, hardware and traffic; `penalty` compares with it.",
        json_schema_extra=t.about(BOUND, "1/s", live=True),
    )

    api_prices: str | None = Field(
        default=None,
        min_length=1,
        description="A TOML file of what APIs charge, for `compare`: "
        "[compare with APIs](../howto/compare-with-apis.md).",
        json_schema_extra=t.about("the path of a file", live=True),
    )

    public_economics: bool = Field(
        default=False,
        description="Let anybody read `/cost/economics` for the trailing week without a token: "
        "costs per token, and the SQL behind them with the prices; no totals.",
        json_schema_extra=t.about("true or false", live=True),
    )

    @property
    def declared(self) -> Declared:
        """The declared latency bounds and full load."""
        return Declared(
            self.slo_ttft_ms,
            self.slo_tpot_ms,
            self.slo_e2e_ms,
            self.slo_percentile,
            self.saturation_output_tokens_per_s,
        )
