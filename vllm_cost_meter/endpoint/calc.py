"""The calculator routes of the side endpoint: `POST /cost/calc/NAME` with a JSON object of inputs.

A calculator uses its inputs only and reads nothing from the ledger, so every viewer may use it.

Invariant: a body takes the names, types and defaults in the function's signature, and no others.
"""

import inspect
import typing
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ConfigDict, Field, create_model

from vllm_cost_meter.economics import Curve, curve_of
from vllm_cost_meter.economics.calculators import CALCULATORS, INPUTS, calculate
from vllm_cost_meter.endpoint.shapes import described, fields_of, shaped


def add_calculators(app: FastAPI) -> None:
    """Add a route for each calculator."""
    for name, function in CALCULATORS.items():
        answer: dict[int | str, Any] = {200: {"model": _answer(name, function)}}
        route = app.post(f"/cost/calc/{name}", name=f"calc {name}", responses=answer)
        route(_handler(name, function))


def _handler(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    model = _model(name, function)

    def calc(given: Any) -> dict[str, Any]:
        inputs = {key: getattr(given, key) for key in type(given).model_fields}
        try:
            if inputs.get("curve") is not None:
                inputs["curve"] = curve_of(inputs["curve"])
            return calculate(name, inputs)
        except ValueError as error:
            raise HTTPException(422, str(error)) from None

    calc.__doc__ = (function.__doc__ or "").partition("\n")[0]
    calc.__annotations__["given"] = model
    return calc


def _answer(name: str, function: Callable[..., Any]) -> Any:
    """Return the shape of a calculator's answer: the inputs as used, the formula, the result."""
    hints = typing.get_type_hints(function)
    result = hints.pop("return")
    used = {given: (shaped(hint), INPUTS[given]) for given, hint in hints.items()}
    inputs = described(f"{_title(name)}Used", "The inputs as they were used.", used)
    fields = {
        "calculator": (str, "The name of the calculator."),
        "inputs": (inputs, "The inputs as they were used, defaults included."),
        "formula": (str, "How the result follows from the inputs."),
        **fields_of(result),
    }
    return described(f"{_title(name)}Answer", inspect.getdoc(result) or "", fields)


def _model(name: str, function: Callable[..., Any]) -> type[BaseModel]:
    hints = typing.get_type_hints(function)
    fields: dict[str, Any] = {
        parameter.name: (
            _json_type(hints[parameter.name]),
            Field(
                ... if parameter.default is inspect.Parameter.empty else parameter.default,
                description=INPUTS[parameter.name],
            ),
        )
        for parameter in inspect.signature(function).parameters.values()
    }
    return create_model(f"{_title(name)}Inputs", __config__=ConfigDict(extra="forbid"), **fields)


def _title(name: str) -> str:
    return "".join(part.title() for part in name.split("-"))


def _json_type(hint: Any) -> Any:
    """Return an input's type in JSON: a curve is a list of points, or an object with `points`."""
    if hint is Curve:
        return list[Any] | dict[str, Any]
    return list[Any] | dict[str, Any] | None if Curve in typing.get_args(hint) else hint
