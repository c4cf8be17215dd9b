"""Holds answers against the OpenAPI document: the types of all fields, and no field besides."""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import jsonschema

# Reports have the columns that they are added up by besides.
WITH_COLUMNS = {"ReportRow"}


def assert_fits(document: Mapping[str, Any], path: str, answer: Any, status: int = 200) -> None:
    """Assert that an answer is as the document says of a path, which it names as it does."""
    (route,) = document["paths"][path].values()
    closed = deepcopy(document["components"]["schemas"])
    for name, schema in closed.items():
        if "properties" in schema and name not in WITH_COLUMNS:
            schema["additionalProperties"] = False
    whole = {**schema_of(route, status), "components": {"schemas": closed}}
    jsonschema.Draft202012Validator(whole).validate(answer)


def schema_of(route: Mapping[str, Any], status: int = 200) -> dict[str, Any]:
    """Return the schema of a route's JSON answer."""
    schema: dict[str, Any] = route["responses"][str(status)]["content"]["application/json"][
        "schema"
    ]
    return schema


def objects_in(
    document: Mapping[str, Any], schema: Mapping[str, Any], seen: set[str] | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the name and schema of each object in a schema, at any depth, each once."""
    seen = set() if seen is None else seen
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        if name not in seen:
            seen.add(name)
            found = document["components"]["schemas"][name]
            yield name, found
            for inner in found.get("properties", {}).values():
                yield from objects_in(document, inner, seen)
    for inner in schema.get("anyOf", ()):
        yield from objects_in(document, inner, seen)
    for word in ("items", "additionalProperties"):
        if isinstance(schema.get(word), Mapping):
            yield from objects_in(document, schema[word], seen)
