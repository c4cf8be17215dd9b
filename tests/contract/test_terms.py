"""Goal: native code and Python have the same terms, corners and constants of the cost model.

Method: read the declarations in `csrc`, and compare each with the Python constant of its name.
"""

import re
from pathlib import Path

import pytest

from vllm_cost_meter.attribution import (
    charge_error_py,
    cost_model,
    cost_model_py,
    curve_fit_py,
    features_py,
    game_py,
    growths_py,
    least_squares_py,
    planes_py,
    priors,
    shapley_py,
)

CSRC = Path(__file__).parents[2] / "csrc"
MODULES = {
    "terms.pxd": (cost_model, planes_py),
    "shapley.pxd": (shapley_py,),
    "least_squares.pxd": (least_squares_py,),
    "planes.pxd": (planes_py,),
    "growths.pxd": (growths_py,),
    "curve_fit.pxd": (curve_fit_py, priors),
    "game.pxd": (game_py,),
    "fit.pxd": (cost_model_py,),
    "features.pxd": (features_py,),
    "charge_error.pxd": (charge_error_py,),
}
# Only native code has these: sizes of its arrays, and another module's name for one.
NATIVE_ONLY = {
    *("KNOTS_COUNT", "RAMPS_COUNT", "PREFILL_KINDS_COUNT", "DECODE_KINDS_COUNT", "COLUMNS"),
    *("WIDTH", "PARTS_MAX", "NODES_COUNT", "LEADER_SUBSETS", "CURVE_START_STEPS", "POWER_MAX"),
    *("KINDS", "USUAL_KINDS"),
}


def constants(name: str) -> dict[str, float]:
    """Return the constants that a file declares, as an enum or for the preprocessor."""
    text = (CSRC / name).read_text()
    enums = re.findall(r"^    ([A-Z_]+) = (0x[0-9A-F]+|\d+)", text, re.MULTILINE)
    defined = re.findall(r"#define ([A-Z_]+) ([-0-9.e]+)", text)
    return {key: int(v, 0) for key, v in enums} | {key: float(v) for key, v in defined}


@pytest.mark.parametrize("name", MODULES)
def test_native_constants_are_those_of_the_twin(name):
    found = constants(name)
    assert found, name
    for key, value in found.items():
        if key in NATIVE_ONLY:
            continue
        known = [
            getattr(module, spelt)
            for module in MODULES[name]
            for spelt in (key, f"_{key}")
            if hasattr(module, spelt)
        ]
        assert known == [value] * len(known) != [], key


@pytest.mark.parametrize("table", ["KNOTS", "RAMPS", "PREFILL_KINDS", "DECODE_KINDS"])
def test_native_corners_are_those_of_the_twin(table):
    body = re.search(rf"{table}\[\d+\] = {{(.*?)}}", (CSRC / "terms.pxd").read_text(), re.DOTALL)
    assert body is not None
    assert [int(value) for value in re.findall(r"\d+", body[1])] == list(getattr(cost_model, table))
    assert constants("terms.pxd")[f"{table}_COUNT"] == len(getattr(cost_model, table))


def test_native_sizes_are_those_of_the_twin():
    sizes = constants("terms.pxd")
    assert sizes["COLUMNS"] == cost_model.FIT_TERMS - cost_model.SLOPES
    assert constants("least_squares.pxd")["WIDTH"] == cost_model.FIT_TERMS
    assert constants("growths.pxd")["NODES_COUNT"] == len(growths_py.NODES)
    assert constants("growths.pxd")["LEADER_SUBSETS"] == 2**growths_py.LEADERS_MAX
    assert constants("curve_fit.pxd")["CURVE_START_STEPS"] == curve_fit_py.START_STEPS
