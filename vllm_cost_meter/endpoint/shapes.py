"""OpenAPI schemas of answers: each field's description is the docstring below the field.

Answer types are typed dictionaries in the ledger and the reports, and dataclasses in the
calculators; none of them imports pydantic. This module turns each into a type that pydantic can
describe in full. It reads the docstrings itself, because pydantic's `use_attribute_docstrings`
leaves out the fields of base classes.

Invariant: shapes serve the document only; no answer is checked or copied when it is sent.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Coroutine, Mapping
from contextvars import ContextVar
from typing import Annotated, Any, NotRequired, Union

from fastapi import Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from orjson import dumps
from pydantic import Field
from typing_extensions import TypedDict, get_original_bases, is_typeddict

from vllm_cost_meter.endpoint.questions import Questions


class OrjsonResponse(JSONResponse):
    """A JSON response made by orjson, which is fast and keeps 64-bit integers exact."""

    def render(self, content: Any) -> bytes:
        """Return the body's bytes."""
        return dumps(content)


# Types of errors by status; of any other the request is invalid.
ERROR_TYPES = {404: "not_found", 503: "unavailable"}


def error_reply(
    status: int,
    message: str,
    error_type: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> OrjsonResponse:
    """Return an error in the one shape that all have; the type follows from the status."""
    kind = error_type or ERROR_TYPES.get(status, "invalid_request")
    return OrjsonResponse(
        {"error": {"message": message, "type": kind, "code": status}}, status, headers
    )


class AnswerRoute(APIRoute):
    """A route that sends its answer unchecked; the document shows the handler's return type."""

    def __init__(self, path: str, endpoint: Any, **options: Any) -> None:
        given = options.get("responses") or {}
        kind = _answer_kind(inspect.signature(endpoint).return_annotation)
        if kind is not None:
            given = {200: {"model": shaped(kind)}, **given}
        # Without a model FastAPI does not validate answers. Validation takes long for large ones.
        options |= {"responses": given, "response_model": None}
        handler = _sent_as_it_is(endpoint)
        self._described = functools.partial(APIRoute, path, handler, **options)
        options["responses"] = {status: _without_model(each) for status, each in given.items()}
        super().__init__(path, handler, **options)
        self.responses = given

    # Models are made ready for the document alone: for all routes that takes most of a start.
    @property
    def response_fields(self) -> Any:
        """The models of answers, by status, as FastAPI has them."""
        return self._models

    @response_fields.setter
    def response_fields(self, of_no_model: Any) -> None:
        pass

    @functools.cached_property
    def _models(self) -> Any:
        return self._described().response_fields

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request, which it can find."""
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            _asked.set(request)
            return await handler(request)

        return handle

    @functools.cached_property
    def query_words(self) -> Mapping[str, bool]:
        """The query words of this route, and whether each may be given several times."""
        document = get_openapi(title="", version="", routes=[self])
        # Routes that the document leaves out have no words.
        described = document["paths"].get(self.path_format, {})
        parameters = [
            each for method in described.values() for each in method.get("parameters", ())
        ]
        return {each["name"]: _is_list(each) for each in parameters if each["in"] == "query"}


def _without_model(response: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in response.items() if name != "model"}


def _is_list(parameter: Mapping[str, Any]) -> bool:
    schema = parameter["schema"]
    return any(each.get("type") == "array" for each in (schema, *schema.get("anyOf", ())))


def shape_of(kind: Any, **instead: Any) -> Any:
    """Return a type with a description of each field, from a typed dictionary or a dataclass.

    `instead` gives some fields another type, by name.
    """
    fields = fields_of(kind)
    for name, other in instead.items():
        fields[name] = (other, fields[name][1])
    optional = getattr(kind, "__optional_keys__", ())
    return described(kind.__name__, inspect.getdoc(kind) or "", fields, optional)


def fields_of(kind: Any) -> dict[str, tuple[Any, str]]:
    """Return the type and the description of each field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    plain = typing.get_type_hints(kind)
    texts = _texts_of(kind)
    names = hints if is_typeddict(kind) else [each.name for each in dataclasses.fields(kind)]
    return {name: (shaped(plain[name]), texts.get(name) or _note_of(hints[name])) for name in names}


def described(
    name: str,
    text: str,
    fields: Mapping[str, tuple[Any, str]],
    optional: typing.Collection[str] = (),
) -> Any:
    """Return a typed dictionary of these fields, each with its type and its description."""
    # `Any` keeps type checkers quiet: they accept only typed dictionaries that are written out.
    make: Any = TypedDict
    of = {field: Annotated[kind, Field(description=said)] for field, (kind, said) in fields.items()}
    made = make(
        name, {field: NotRequired[of[field]] if field in optional else of[field] for field in of}
    )
    made.__doc__ = text
    return made


@functools.cache
def _shared(kind: Any) -> Any:
    # The cache makes one type for each, so the document has each schema once.
    return shape_of(kind)


def shaped(hint: Any) -> Any:
    """Replace typed dictionaries and dataclasses in a type by their described forms."""
    if is_typeddict(hint) or dataclasses.is_dataclass(hint):
        return _shared(hint)
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is None or origin is typing.Literal:
        return hint
    of = tuple(shaped(each) for each in args)
    if origin in (Union, types.UnionType):
        return Union[of]  # noqa: UP007 - made of what is known at run time only
    return origin[of]


def _answer_kind(hint: Any) -> Any:
    """Return the type of an answer's JSON; None if the handler returns a response only."""
    members = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    kept = [each for each in members if not _is_response(each)]
    if not kept or kept[0] is inspect.Signature.empty:
        return None
    return Union[tuple(kept)]  # noqa: UP007 - made of what is known at run time only


def _is_response(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Response)


# The request that a handler answers.
_asked: ContextVar[Request] = ContextVar("cost_meter_asked")


def _sent_as_it_is(endpoint: Any) -> Any:
    """Wrap a handler so that its answer becomes a response, which FastAPI does not copy.

    A plain function is a question and has its turn. A coroutine function reads no ledger and
    answers at once.
    """

    @functools.wraps(endpoint)
    async def respond(*args: Any, **kwargs: Any) -> Response:
        if inspect.iscoroutinefunction(endpoint):
            return _response(await endpoint(*args, **kwargs))
        request = _asked.get()
        questions: Questions = request.app.state.questions

        async def gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        # The bytes are made in the thread, too: of a large answer that takes long.
        return await questions.answer(lambda: _response(endpoint(*args, **kwargs)), gone)

    return respond


def _response(answer: Any) -> Response:
    return answer if isinstance(answer, Response) else OrjsonResponse(answer)


def _texts_of(kind: Any) -> dict[str, str]:
    """Return the descriptions of a class's fields, inherited ones first."""
    found: dict[str, str] = {}
    for base in get_original_bases(kind):
        if is_typeddict(base):
            found |= _texts_of(base)
    return found | _texts_in(kind.__module__).get(kind.__name__, {})


def _note_of(hint: Any) -> str:
    """Return the text in an `Annotated` type: fields such as `from` cannot have a docstring."""
    notes = getattr(hint, "__metadata__", ())
    return next((note for note in notes if isinstance(note, str)), "")


@functools.cache
def _texts_in(module: str) -> dict[str, dict[str, str]]:
    """Return the docstring below each field, by class and field of a module."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, SyntaxError):
        return {}  # The package is installed without its source: the document lacks the texts.
    return {
        node.name: {
            field.target.id: inspect.cleandoc(text.value.value)
            for field, text in zip(node.body, node.body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        }
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
