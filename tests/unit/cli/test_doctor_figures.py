"""What the doctor says of how well charges are known."""

from typing import Any

import pytest

from vllm_cost_meter.cli.doctor.figures import charges_known

KNOWN = {"prefill_beyond": 0.029, "decode_to_4096_context": 0.052, "prefill_to_32_tokens": 0.4}


@pytest.mark.parametrize(
    ("errors", "said"),
    [
        (KNOWN, "charges are known to within 2.9% (prompts), 5.2% (decodes)"),
        ({**KNOWN, "prefill_beyond": 1.0}, "charges are known to within 5.2% (decodes)"),
        (dict.fromkeys(KNOWN, 1.0), "how far charges may be off is not known yet"),
        (None, "how far charges may be off is not known yet"),
    ],
)
def test_only_errors_that_are_known_are_said(errors: dict[str, float] | None, said: str) -> None:
    model: Any = {"charge_errors": errors}
    assert charges_known(model) == said
