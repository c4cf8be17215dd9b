"""What one reply may carry: what the settings say, and what its request asks for.

A stream gets a comment line with its cost only where the operator or the client asks for one: some
decoders take every line of a stream for data. A web page of another origin sees only those headers
of a reply that the reply exposes, so ours are exposed wherever a browser asks from one.

Invariant: a request changes what its own reply tells, within what the operator allows, and nothing
else.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_cost_meter.api_server.refusal import Headers
from vllm_cost_meter.config.types import ReplyDetail, StreamComment

# A request header that asks for a comment in a stream, or for none.
COMMENT_HEADER = b"x-cost-meter-comment"
_ANSWERS = {b"1": True, b"true": True, b"yes": True, b"0": False, b"false": False, b"no": False}

# Browsers show these of any reply.
_ALWAYS_SEEN = frozenset({b"content-type", b"content-length"})


@dataclass(frozen=True, slots=True)
class ReplyPlan:
    """What one reply may carry; `warnings` are headers."""

    detail: ReplyDetail
    comments: bool = False
    is_cross_origin: bool = False
    warnings: Sequence[tuple[bytes, bytes]] = ()

    def exposed(self, added: Sequence[tuple[bytes, bytes]]) -> Headers:
        """Return headers that are added to a reply, and where needed the one that exposes them."""
        names = [name for name, _ in added if name not in _ALWAYS_SEEN]
        if not (self.is_cross_origin and names):
            return list(added)
        return [*added, (b"access-control-expose-headers", b", ".join(names))]


def plan_of(
    request_headers: Iterable[tuple[bytes, bytes]],
    detail: ReplyDetail,
    stream_comment: StreamComment,
    warnings: Sequence[tuple[bytes, bytes]] = (),
) -> ReplyPlan:
    """Return what the reply to a request may carry; `detail` is what its tenant is told."""
    asked, is_cross_origin = None, False
    for name, value in request_headers:
        if name == COMMENT_HEADER:
            asked = _ANSWERS.get(value.strip().lower(), asked)
        elif name == b"origin":
            is_cross_origin = True
    return ReplyPlan(
        detail=detail,
        comments=detail == "all" and (stream_comment == "always" if asked is None else asked),
        is_cross_origin=is_cross_origin,
        warnings=warnings if detail != "none" else (),
    )


def exposed_to(request_headers: Iterable[tuple[bytes, bytes]], added: Headers) -> Headers:
    """Return the headers of a reply of ours, exposed to a page of another origin that asked."""
    return plan_of(request_headers, "none", "asked").exposed(added)
