"""Ask a server by the clients that Python programs use; print a JSON line for each request.

Run in an environment that has these clients and nothing of ours: `in_python.py URL MODEL`. Each
request has an `x-request-id` of its own, by which the test finds its bill.
"""

import asyncio
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

KEY = "key-of-alpha"
MESSAGES = [{"role": "user", "content": "Name a river."}]
MAX_TOKENS = 8
CITY = {"type": "string", "enum": ["Paris", "Rome"]}
PARAMETERS = {
    "type": "object",
    "properties": {"city": CITY},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": PARAMETERS, "strict": True},
}
CHOICE = {"type": "function", "function": {"name": "weather"}}
# A random model ends its arguments if it may not repeat itself.
SAMPLED = {"max_tokens": 128, "frequency_penalty": 2}
TOOLS = {"tools": [TOOL], "tool_choice": CHOICE, **SAMPLED}
USAGE = {"stream_options": {"include_usage": True}}

Said = dict[str, Any]
Asks = Iterator[tuple[str, Callable[[str], Said]]]


def said(text: str | None, usage: Any = None, cost: float | None = None) -> Said:
    """Return what a client understood of a reply; `usage` as OpenAI has it."""
    if usage is not None and not isinstance(usage, dict):
        usage = usage.model_dump() if hasattr(usage, "model_dump") else dict(usage)
    usage = usage or {}
    return {
        "text": text,
        "prompt_tokens": usage.get("prompt_tokens"),
        "output_tokens": usage.get("completion_tokens"),
        "cost": usage.get("cost") if cost is None else cost,
    }


def openai_client(url: str, model: str) -> Asks:
    import openai

    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
    same: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": MAX_TOKENS}

    def complete(id: str, **more: Any) -> Said:
        raw = client.chat.completions.with_raw_response.create(
            **{**same, **more}, extra_headers={"x-request-id": id}
        )
        reply = raw.parse()
        message = reply.choices[0].message
        texts = [choice.message.content or "" for choice in reply.choices]
        if message.tool_calls:
            texts = [call.function.arguments for call in message.tool_calls]
        told = raw.headers.get("x-cost-meter-cost-usd")
        return said("".join(texts), reply.usage, None if told is None else float(told))

    def streamed(id: str, **more: Any) -> Said:
        text, usage = "", None
        with client.chat.completions.create(
            **{**same, **more}, stream=True, extra_headers={"x-request-id": id}
        ) as stream:
            for chunk in stream:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    for call in choice.delta.tool_calls or ():
                        text += call.function.arguments or ""
        return said(text, usage)

    def typed_events(id: str) -> Said:
        with client.chat.completions.stream(
            **same, **USAGE, extra_headers={"x-request-id": id}
        ) as stream:
            for event in stream:
                if event.type == "chunk":
                    last = event.snapshot
        return said(last.choices[0].message.content, last.usage)

    yield "complete", complete
    yield "streamed", streamed
    yield "streamed, with usage", lambda id: streamed(id, **USAGE)
    yield "typed events", typed_events
    yield "n=2", lambda id: complete(id, n=2)
    yield "n=2, streamed, with usage", lambda id: streamed(id, n=2, **USAGE)
    yield "tool call", lambda id: complete(id, **TOOLS)
    yield "tool call, streamed, with usage", lambda id: streamed(id, **TOOLS, **USAGE)
    yield from openai_other_routes(client, model)


def openai_other_routes(client: Any, model: str) -> Asks:
    """Ask by the same client for text, and for responses."""

    def text(id: str) -> Said:
        reply = client.completions.create(
            model=model, prompt="A river", max_tokens=4, extra_headers={"x-request-id": id}
        )
        return said(reply.choices[0].text, reply.usage)

    asked = {"model": model, "input": "Name a river.", "max_output_tokens": MAX_TOKENS}

    def response(id: str) -> Said:
        return understood(client.responses.create(**asked, extra_headers={"x-request-id": id}))

    def streamed_response(id: str) -> Said:
        last = None
        for event in client.responses.create(
            **asked, stream=True, extra_headers={"x-request-id": id}
        ):
            if event.type in ("response.completed", "response.incomplete"):
                last = event.response
        return understood(last)

    def understood(reply: Any) -> Said:
        usage = reply.usage.model_dump()
        tokens = {
            "prompt_tokens": usage["input_tokens"],
            "completion_tokens": usage["output_tokens"],
        }
        return said(reply.output_text, tokens | {"cost": usage.get("cost")})

    yield "text completion", text
    yield "response", response
    yield "response, streamed", streamed_response


def anthropic_client(url: str, model: str) -> Asks:
    import anthropic

    client = anthropic.Anthropic(base_url=url, auth_token=KEY, max_retries=0)
    same: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": MAX_TOKENS}

    def understood(message: Any) -> Said:
        usage = message.usage.model_dump()
        tokens = {
            "prompt_tokens": usage["input_tokens"],
            "completion_tokens": usage["output_tokens"],
        }
        text = "".join(block.text for block in message.content if block.type == "text")
        return said(text, tokens | {"cost": usage.get("cost")})

    def complete(id: str) -> Said:
        return understood(client.messages.create(**same, extra_headers={"x-request-id": id}))

    def streamed(id: str) -> Said:
        with client.messages.stream(**same, extra_headers={"x-request-id": id}) as stream:
            return understood(stream.get_final_message())

    yield "complete", complete
    yield "streamed", streamed


def langchain(url: str, model: str) -> Asks:
    from langchain_openai import ChatOpenAI

    def chat(id: str, **more: Any) -> Any:
        return ChatOpenAI(
            base_url=f"{url}/v1",
            api_key=KEY,
            model=model,
            max_tokens=MAX_TOKENS,
            max_retries=0,
            default_headers={"x-request-id": id},
            **more,
        )

    def understood(message: Any) -> Said:
        usage = message.usage_metadata or {}
        tokens = {
            "prompt_tokens": usage.get("input_tokens"),
            "completion_tokens": usage.get("output_tokens"),
        }
        told = message.response_metadata.get("headers", {}).get("x-cost-meter-cost-usd")
        calls = [json.dumps(call["args"]) for call in message.tool_calls]
        text = "".join(calls) or message.content
        return said(text, tokens, None if told is None else float(told))

    def streamed(id: str, **more: Any) -> Said:
        whole = None
        for chunk in chat(id, **more).stream("Name a river."):
            whole = chunk if whole is None else whole + chunk
        return understood(whole)

    def tool(id: str) -> Said:
        bound = chat(id).bind_tools([TOOL], tool_choice="weather")
        return understood(bound.invoke("Weather?", **SAMPLED))

    def complete(id: str) -> Said:
        return understood(chat(id, include_response_headers=True).invoke("Name a river."))

    yield "complete", complete
    yield "streamed", lambda id: streamed(id, stream_usage=False)
    yield "streamed, with usage", lambda id: streamed(id, stream_usage=True)
    yield "n=2", lambda id: understood(chat(id, n=2).invoke("Name a river."))
    yield "tool call", tool


def llama_index(url: str, model: str) -> Asks:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    def chat(id: str, **more: Any) -> Any:
        return OpenAILike(
            model=model,
            api_base=f"{url}/v1",
            api_key=KEY,
            is_chat_model=True,
            max_tokens=MAX_TOKENS,
            max_retries=0,
            context_window=8_000,
            default_headers={"x-request-id": id},
            additional_kwargs=more,
        )

    asked = [ChatMessage(role="user", content="Name a river.")]

    def complete(id: str) -> Said:
        reply = chat(id).chat(asked)
        return said(reply.message.content, reply.raw.usage)

    def streamed(id: str, **more: Any) -> Said:
        text, usage = "", None
        for chunk in chat(id, **more).stream_chat(asked):
            text += chunk.delta or ""
            usage = getattr(chunk.raw, "usage", None) or usage
        return said(text, usage)

    yield "complete", complete
    yield "streamed", streamed
    yield "streamed, with usage", lambda id: streamed(id, **USAGE)


def litellm_sdk(url: str, model: str) -> Asks:
    import litellm

    litellm.suppress_debug_info = True
    same: dict[str, Any] = {
        "model": f"hosted_vllm/{model}",
        "api_base": f"{url}/v1",
        "api_key": KEY,
        "messages": MESSAGES,
        "max_tokens": MAX_TOKENS,
        "num_retries": 0,
    }

    def complete(id: str, **more: Any) -> Said:
        reply = litellm.completion(**{**same, **more}, extra_headers={"x-request-id": id})
        message = reply.choices[0].message
        calls = [call.function.arguments for call in message.tool_calls or ()]
        cost = reply._hidden_params.get("response_cost")
        return said("".join(calls) or message.content, reply.usage, cost)

    def streamed(id: str, **more: Any) -> Said:
        chunks = list(
            litellm.completion(**{**same, **more}, stream=True, extra_headers={"x-request-id": id})
        )
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        usage = next((c.usage for c in reversed(chunks) if getattr(c, "usage", None)), None)
        return said(text, usage)

    yield "complete", complete
    yield "streamed", streamed
    yield "streamed, with usage", lambda id: streamed(id, **USAGE)
    yield "n=2", lambda id: complete(id, n=2)
    yield "tool call", lambda id: complete(id, **TOOLS)


def pydantic_ai(url: str, model: str) -> Asks:
    from pydantic_ai import Agent
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    def agent() -> Any:
        # Of its own: a connection of an event loop that has ended is tried, and asked again.
        provider = OpenAIProvider(base_url=f"{url}/v1", api_key=KEY)
        return Agent(OpenAIChatModel(model, provider=provider))

    def settings(id: str) -> Any:
        return {"max_tokens": MAX_TOKENS, "extra_headers": {"x-request-id": id}}

    def understood(text: str, usage: Any) -> Said:
        tokens = {"prompt_tokens": usage.input_tokens, "completion_tokens": usage.output_tokens}
        return said(text, tokens)

    def complete(id: str) -> Said:
        run = agent().run_sync("Name a river.", model_settings=settings(id))
        return understood(run.output, used(run))

    def streamed(id: str) -> Said:
        async def ask() -> Said:
            async with agent().run_stream("Name a river.", model_settings=settings(id)) as run:
                text = await run.get_output()
                return understood(text, used(run))

        return asyncio.run(ask())

    def used(run: Any) -> Any:
        return run.usage() if callable(run.usage) else run.usage

    yield "complete", complete
    yield "streamed, with usage", streamed


CLIENTS: dict[str, Callable[[str, str], Asks]] = {
    "openai": openai_client,
    "anthropic": anthropic_client,
    "langchain": langchain,
    "llama-index": llama_index,
    "litellm": litellm_sdk,
    "pydantic-ai": pydantic_ai,
}


def main() -> None:
    """Ask by all clients, in all ways."""
    url, model, *names = sys.argv[1:]
    for name in names or CLIENTS:
        for way, ask in CLIENTS[name](url, model):
            id = f"{name}: {way}"
            try:
                found = ask(id)
            except Exception:
                found = {"error": traceback.format_exc()[-2000:]}
            print(json.dumps({"id": id, **found}), flush=True)


if __name__ == "__main__":
    main()
