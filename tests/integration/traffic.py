"""Real requests over every generating route, and what their clients were told."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import httpx

PROMPT = "The quick brown fox jumps over the lazy dog and then goes home to sleep."


@dataclass
class Reply:
    """What one client saw."""

    status: int
    headers: Mapping[str, str]
    response_id: str
    usage: dict[str, Any] | None
    comments: list[str]
    body: bytes

    @property
    def prompt_tokens(self) -> int:
        usage = self.usage or {}
        if "prompt_tokens" in usage:
            return int(usage["prompt_tokens"])
        return int(usage["input_tokens"]) + int(usage.get("cache_read_input_tokens") or 0)

    @property
    def output_tokens(self) -> int:
        usage = self.usage or {}
        return int(usage.get("completion_tokens", usage.get("output_tokens")))

    @property
    def cached_tokens(self) -> int:
        usage = self.usage or {}
        if "cache_read_input_tokens" in usage:
            return int(usage["cache_read_input_tokens"] or 0)
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        return int(details.get("cached_tokens") or 0)


def body_of(route: str, **options: Any) -> dict[str, Any]:
    """Return a request body for a route; options are the route's own."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/completions": {"prompt": PROMPT, "max_tokens": 12},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 12,
        },
        "/v1/responses": {"input": PROMPT, "max_output_tokens": 12},
        "/v1/messages": {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 12,
        },
    }
    return {"model": "tiny", "temperature": 0, **bodies[route], **options}


def ask(client: httpx.Client, route: str, **options: Any) -> Reply:
    """Send one request and read its whole reply, complete or streamed."""
    reply = client.post(route, json=body_of(route, **options))
    if reply.headers["content-type"].startswith("text/event-stream"):
        return _streamed(reply)
    content = reply.json()
    return Reply(
        status=reply.status_code,
        headers=reply.headers,
        response_id=content["id"],
        usage=content.get("usage"),
        comments=[],
        body=reply.content,
    )


def _streamed(reply: httpx.Response) -> Reply:
    response_id, usage, comments = "", None, []
    for line in reply.text.splitlines():
        if line.startswith(":"):
            comments.append(line)
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line.removeprefix("data: "))
        inner = event.get("response") or event.get("message") or event
        response_id = response_id or inner.get("id") or ""
        seen = inner.get("usage") or event.get("usage")
        if seen:
            usage = {**(usage or {}), **seen}
    return Reply(
        status=reply.status_code,
        headers=reply.headers,
        response_id=response_id,
        usage=usage,
        comments=comments,
        body=reply.content,
    )
