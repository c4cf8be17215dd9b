"""Ask a server over HTTP, as commands do, and show it a token that nobody else gets to see.

Python's own client follows a redirect to anywhere and takes the token along. Neither the side
endpoint nor vLLM redirects, so one that does is another program.

Invariant: a token goes to the address that was asked, and to no other.
"""

import http.client
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from vllm_cost_meter.errors import ServerError, StatusError, UnansweredError
from vllm_cost_meter.units.text import ECHOED_CHARS_MAX, plain

T = TypeVar("T")

# An answer that is longer is not ours.
_BODY_BYTES_MAX = 64 << 20
_SHOWN_CHARS_MAX = min(ECHOED_CHARS_MAX, 80)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Takes every redirect for an answer with an error."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def get(
    url: str, token: str | None, expected: str, timeout_s: float, *, proxies: bool = True
) -> bytes:
    """Return the body of an answer; `expected` says what was expected to answer there.

    With `proxies` those of the environment are used. Raises UnansweredError, StatusError and
    ServerError.
    """
    return _ask(url, None, _shown_to(token), expected, timeout_s, proxies=proxies)


def post_json(
    url: str, token: str | None, body: bytes, headers: Mapping[str, str], timeout_s: float
) -> bytes:
    """Send a body in JSON to vLLM, past all proxies; return that of the answer. Raises as `get`."""
    sent = {**headers, **_shown_to(token), "content-type": "application/json"}
    return _ask(url, body, sent, "vLLM", timeout_s, proxies=False)


def _shown_to(token: str | None) -> dict[str, str]:
    return {} if token is None else {"authorization": f"Bearer {token}"}


def _ask(
    url: str,
    body: bytes | None,
    headers: dict[str, str],
    expected: str,
    timeout_s: float,
    *,
    proxies: bool,
) -> bytes:
    through = urllib.request.ProxyHandler(None if proxies else {})
    try:
        # The user's own URL; one that is no web address is refused just so.
        request = urllib.request.Request(url, body, headers)  # noqa: S310
        opener = urllib.request.build_opener(_NoRedirects(), through)
        with opener.open(request, timeout=timeout_s) as answer:
            answered: bytes = answer.read(_BODY_BYTES_MAX)
            return answered
    except urllib.error.HTTPError as error:
        with error:
            to = error.headers.get("location")
        redirect = f", a redirect to {_shown(to)} that is not followed" if to else ""
        raise StatusError(
            f"{url} answered {error.code}{redirect}; expected {expected} there", error.code
        ) from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        why = getattr(error, "reason", error)
        if isinstance(error, urllib.error.URLError | TimeoutError):
            raise UnansweredError(f"none answers at {url}: {why}; expected {expected}") from None
        raise ServerError(f"expected {expected} at {url}: {why}") from None


def get_json(url: str, token: str | None, expected: str, timeout_s: float, type: type[T]) -> T:
    """Return an answer in JSON of the type expected, past all proxies. Raises as `get` does."""
    body = get(url, token, expected, timeout_s, proxies=False)
    try:
        return msgspec.json.decode(body, type=type)
    except msgspec.ValidationError as error:
        raise ServerError(
            f"expected {expected} at {url}, got other JSON ({error}): another program, or another"
            " version of the cost meter"
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        got = _shown(body.decode("utf-8", "replace")) if body else "an empty answer"
        raise ServerError(f"expected {expected} at {url}, got {got}: another program") from None


def _shown(text: str) -> str:
    return repr(plain(text[:_SHOWN_CHARS_MAX]))
