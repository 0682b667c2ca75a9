"""Validation errors as fal's framework (pydantic behind FastAPI) words them, of the body and of the input.

Pure. Only what models have in common is checked: required members, counts, picture sizes, durations. Parameters
that a model does not know are ignored, as fal's models mostly do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from abhiapi.pricing import Estimate
from abhiapi.sandbox.models import STAND_INS, Model
from abhiapi.sandbox.sizes import IMAGE_SIZES, SIDE_MAX

Problem = dict[str, Any]

_ECHO_MAX_BYTES = 64 * 1024  # fal echoes any input; a simulator need not send 50 MB back


def parsed(body: bytes) -> tuple[Mapping[str, Any], list[Problem]]:
    """The model's input from a request's body, or what is wrong with the body. Decimals stand for fractions."""
    if not body.strip():
        return {}, [_problem(["body"], "missing", "Field required", None)]
    try:
        value = json.loads(body, parse_float=Decimal, parse_constant=Decimal)
    except json.JSONDecodeError as error:
        return {}, [_not_json(error.pos, error.msg)]
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of too many digits, too deep
        return {}, [_not_json(0, str(error))]
    if not isinstance(value, dict):
        text = "Input should be a valid dictionary or object to extract fields from"
        return {}, [_problem(["body"], "model_attributes_type", text, _echo(value, len(body)))]
    return value, []


def problems(model: Model, estimate: Estimate, call_input: Mapping[str, Any], size_bytes: int) -> list[Problem]:
    """Everything that fal would refuse in this input, in its own words; empty when it would run."""
    found = _missing(model, call_input, size_bytes)
    for name, most in ((estimate.count_param, model.images_max), (estimate.batch_param, 15)):
        if name is not None and model.shape in ("image", "partner"):
            found += _whole_number(name, call_input.get(name), most)
    if model.shape == "image":
        found += _image_size(call_input.get("image_size"))
    if model.shape == "video":
        found += _duration(model, call_input.get("duration"))
    return found


def _missing(model: Model, call_input: Mapping[str, Any], size_bytes: int) -> list[Problem]:
    found = []
    for name in model.required:
        value = call_input.get(name)
        if value is None and not any(call_input.get(other) for other in STAND_INS.get(name, ())):
            echo = _echo(call_input, size_bytes)
            found.append(_problem(["body", name], "missing", "Field required", echo))
        elif name in ("prompt", "text") and value is not None and not isinstance(value, str):
            found.append(_problem(["body", name], "string_type", "Input should be a valid string", _plain(value)))
    return found


def _whole_number(name: str, given: Any, most: int) -> list[Problem]:
    where = ["body", name]
    if given is None:
        return []
    if isinstance(given, str) and re.fullmatch(r"\s*[+-]?\d{1,18}\s*", given):
        given = int(given)
    if isinstance(given, Decimal) and given.is_finite() and given == given.to_integral_value():
        given = int(given) if abs(given) <= SIDE_MAX else SIDE_MAX
    if isinstance(given, str):
        text = "Input should be a valid integer, unable to parse string as an integer"
        return [_problem(where, "int_parsing", text, given)]
    if isinstance(given, Decimal):
        text = "Input should be a valid integer, got a number with a fractional part"
        return [_problem(where, "int_from_float", text, _plain(given))]
    if not isinstance(given, int):
        return [_problem(where, "int_type", "Input should be a valid integer", _plain(given))]
    if given < 1:
        text = "Input should be greater than or equal to 1"
        return [_problem(where, "greater_than_equal", text, _plain(given), {"ge": 1})]
    if given > most:
        text = f"Input should be less than or equal to {most}"
        return [_problem(where, "less_than_equal", text, _plain(given), {"le": most})]
    return []


def _image_size(given: Any) -> list[Problem]:
    where = ["body", "image_size"]
    if given is None:
        return []
    if isinstance(given, Mapping):
        found = []
        for side in ("width", "height"):
            value = given.get(side)
            if value is not None:
                wrong = _whole_number(side, value, SIDE_MAX)
                found += [{**problem, "loc": [*where, side]} for problem in wrong]
        return found
    if isinstance(given, str) and given in IMAGE_SIZES:
        return []
    expected = _alternatives([f"'{name}'" for name in IMAGE_SIZES])
    return [_problem(where, "enum", f"Input should be {expected}", _plain(given), {"expected": expected})]


def _duration(model: Model, given: Any) -> list[Problem]:
    where = ["body", "duration"]
    if given is None:
        return []
    if not model.durations:
        is_sayable = isinstance(given, str | int | Decimal) and not isinstance(given, bool)
        number = re.fullmatch(r"(\d{1,4})(\.\d{1,6})?s?", str(given)) if is_sayable else None
        if number and 0 < int(number[1]) <= 60:
            return []
        return [_problem(where, "number_type", "Input should be a duration of 1 to 60 seconds", _plain(given))]
    fitting = [each for each in model.durations if each == given and type(each) is type(given)]
    if fitting:
        return []
    expected = _alternatives([repr(each) for each in model.durations])
    return [_problem(where, "literal_error", f"Input should be {expected}", _plain(given), {"expected": expected})]


def _alternatives(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _not_json(position: int, why: str) -> Problem:
    return _problem(["body", position], "json_invalid", "JSON decode error", {}, {"error": why[:200]})


def _problem(where: list[Any], kind: str, text: str, given: Any, context: Mapping[str, Any] | None = None) -> Problem:
    problem: Problem = {"loc": where, "msg": text, "type": kind}
    if kind != "json_invalid":
        problem["url"] = f"https://docs.fal.ai/errors#{kind}"
    if context:
        problem["ctx"] = dict(context)
    problem["input"] = given
    return problem


def _echo(value: Any, size_bytes: int) -> Any:
    return _plain(value) if size_bytes <= _ECHO_MAX_BYTES else None


def _plain(value: Any) -> Any:
    """The value as the JSON encoder takes it: no Decimals, and no whole numbers too long to print."""
    if isinstance(value, Decimal):
        return json.loads(str(value)) if value.is_finite() and value.adjusted() < 300 else str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4_096:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, Mapping):
        return {name: _plain(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_plain(member) for member in value]
    return value
