"""vLLM's routes: label request paths for the ledger, and derive a reply's id from an engine id.

Each route gives the engine an external id that it builds from the id in its reply. Completions add
the prompt's number, and the Responses API adds its turn. Beam search adds a random id and the
beam's number. The base is often the client's X-Request-Id, which may itself contain dashes, digits
or `_0`. So a route's rule strips exactly what that route adds, from the end, once. A route that
adds nothing strips nothing. The forms were read in vLLM 0.32 (`entrypoints/`) and are the same from
0.25 to 0.33.

Invariant: `response_id_of` returns an id that vLLM could have shown, or None if the id is unknown;
it never guesses. The id is not a key, because two clients may choose the same X-Request-Id. Bills
are keyed by (run, seq).
"""

import re
from collections.abc import Callable

from vllm_cost_meter.records.client_text import stored

LABEL_CHARS_MAX = 128

# vllm.utils.random_uuid: 16 hex digits; older releases used all 32 of a UUID.
_RANDOM = r"[0-9a-f]{16}(?:[0-9a-f]{16})?"
_BEAM = re.compile(rf"-{_RANDOM}-beam-\d+\Z", re.ASCII)
_DASH_INDEX = re.compile(r"-\d+\Z", re.ASCII)
_UNDERSCORE_INDEX = re.compile(r"_\d+\Z", re.ASCII)
_CHUNK = re.compile(r"-prompt-\d+-chunk-\d+\Z", re.ASCII)
_AUDIO_DEFAULT = re.compile(rf"((?:transcribe|translate)-{_RANDOM})(?:-\d+)?\Z", re.ASCII)

_Rule = Callable[[str], str | None]


def _without(pattern: re.Pattern[str], text: str) -> str | None:
    """Return the text without the ending that the route always adds; None if that is missing."""
    match = pattern.search(text)
    return text[: match.start()] if match else None


def _chat(external_id: str) -> str | None:
    return _without(_BEAM, external_id) or external_id


def _completion(external_id: str) -> str | None:
    return _without(_BEAM, external_id) or _without(_DASH_INDEX, external_id)


def _underscored(external_id: str) -> str | None:
    return _without(_UNDERSCORE_INDEX, external_id)


def _dashed(external_id: str) -> str | None:
    return _without(_DASH_INDEX, external_id)


def _pooling(external_id: str) -> str | None:
    if external_id.startswith("late-interaction-"):
        return None  # vLLM made this id from a random id that no client sees.
    return _without(_CHUNK, external_id) or _without(_DASH_INDEX, external_id)


def _unchanged(external_id: str) -> str | None:
    return external_id


def _audio(external_id: str) -> str | None:
    """Audio routes add `-i` only for long recordings; a client's own id may end like that, too."""
    base = (_without(_BEAM, external_id) or external_id).removesuffix("-lang_detect")
    if match := _AUDIO_DEFAULT.match(base):
        return match[1]
    return None if _DASH_INDEX.search(base) else base


def _unseen(external_id: str) -> str | None:
    return None


# The order matters: "chatcmpl-" is not "cmpl-".
_BY_PREFIX: tuple[tuple[str, _Rule], ...] = (
    ("chatcmpl-", _chat),
    ("cmpl-", _completion),
    ("embd-", _pooling),
    ("pooling-", _pooling),
    ("classify-", _pooling),
    ("score-", _pooling),
)


def _by_prefix(external_id: str) -> str | None:
    """SageMaker's /invocations serves several routes; the id's prefix shows which one it was."""
    for prefix, rule in _BY_PREFIX:
        if external_id.startswith(prefix):
            return rule(external_id)
    return None


_RULES: dict[str, _Rule] = {
    "/v1/chat/completions": _chat,
    "/v1/chat/completions/batch": _underscored,
    "/v1/completions": _completion,
    "/v1/responses": _underscored,
    "/v1/messages": _chat,
    "/cohere/v2/chat": _chat,
    "/inference/v1/generate": _unchanged,
    "/v1/embeddings": _pooling,
    "/v2/embed": _pooling,
    "/pooling": _pooling,
    "/classify": _pooling,
    "/score": _pooling,
    "/v1/score": _pooling,
    "/rerank": _pooling,
    "/v1/rerank": _pooling,
    "/v2/rerank": _pooling,
    "/generative_scoring": _dashed,
    "/v1/systemone": _dashed,
    "/v1/audio/transcriptions": _audio,
    "/v1/audio/translations": _audio,
    "/v1/realtime": _unseen,
    "/invocations": _by_prefix,
}

# The labels of the routes that use an engine.
KNOWN_ROUTES = frozenset(_RULES)

# The labels of the meter's own routes on vLLM's port: each tells a tenant its own figures.
OWN_ROUTES = frozenset({"/v1/cost/me", "/v1/cost/requests/{request_id}"})

_RESPONSE = re.compile(r"/v1/responses/(?!render\Z)[^/]+(/cancel)?\Z")
_OWN_REQUEST = re.compile(r"/v1/cost/requests/.")


def route_of(path: str) -> str:
    """Return the ledger's label for a request path (given without the server's root path)."""
    if path in _RULES:
        return path
    if match := _RESPONSE.match(path):
        return "/v1/responses/{response_id}" + (match[1] or "")
    if _OWN_REQUEST.match(path):
        return "/v1/cost/requests/{request_id}"
    return stored(path[:LABEL_CHARS_MAX])


def reaches_engine(route: str) -> bool:
    """Return whether requests of a route use an engine; `route` is its label."""
    return route in _RULES


def replies_in_bytes(route: str) -> bool:
    """Return whether a route answers with all its bytes at once, where a client asks for bytes."""
    return _RULES.get(route) in (_pooling, _by_prefix)


def serves_tenants(route: str) -> bool:
    """Return whether it matters who asks: for an engine's time, or for a tenant's own figures."""
    return route in _RULES or route in OWN_ROUTES


def response_id_of(route: str, external_id: str) -> str | None:
    """Return the id that the client saw in the reply; None if it is unknown."""
    rule = _RULES.get(route)
    return rule(external_id) if rule else None
