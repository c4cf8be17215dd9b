"""Questions and answers between an API server and a side process, over one socket.

Both ends ask: each question has a name, a value and a number, and the answer has that number. News
has no answer. A message is its length (4 bytes, big-endian) and a msgspec struct in MessagePack,
which carries bytes as they are. Values are encoded here and decoded to the type that the receiver
expects, so what is not of that type is refused.

Invariant: an `ask` ends within its time, with an answer or an error, whatever the other end does.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import msgspec

from vllm_cost_meter.errors import AwayError, CostMeterError
from vllm_cost_meter.logs import meter_logger

logger = meter_logger()

T = TypeVar("T")

# The longest message: an answer of the side endpoint that a tenant reads on vLLM's port.
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
# Bytes that wait for an end that does not read; beyond them nothing more is asked.
UNREAD_BYTES_MAX = 8 * 1024 * 1024
LENGTH_BYTES = 4

# Each end answers this by itself, so that the other one can see that it is alive.
PING = "ping"


class AskMessage(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """A question."""

    id: int
    name: str
    given: msgspec.Raw


class AnswerMessage(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    """The answer to a question."""

    id: int
    value: msgspec.Raw


class RefusalMessage(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """Why a question has no answer. `kind` is the name of the error's class."""

    id: int
    kind: str
    reason: str


class NewsMessage(msgspec.Struct, frozen=True, array_like=True, tag="news"):
    """Something the other end should know."""

    name: str
    value: msgspec.Raw


Message = AskMessage | AnswerMessage | RefusalMessage | NewsMessage
# Answer a question and take up news, by name. The value is still encoded: see `decoded`.
Answerer = Callable[[str, msgspec.Raw], Awaitable[object]]
NewsTaker = Callable[[str, msgspec.Raw], None]

_decoder = msgspec.msgpack.Decoder(Message)
_encode = msgspec.msgpack.encode


class RefusedError(CostMeterError):
    """The other end could not answer. `kind` is the name of its error's class."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def decoded(value: msgspec.Raw, type: type[T]) -> T:
    """Return a value as this type. Raises msgspec.ValidationError for what is none."""
    return msgspec.msgpack.decode(value, type=type)


class Channel:
    """One end. Used by one event loop only."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        answer: Answerer,
        take: NewsTaker,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._answer = answer
        self._take = take
        self._asked: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._next_id = 0
        self._answering: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Take up messages until the other end is gone; then whoever waits has an AwayError."""
        try:
            while True:
                length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES))
                if length > MESSAGE_BYTES_MAX:
                    raise msgspec.DecodeError(f"expected {MESSAGE_BYTES_MAX} bytes, got {length}")
                self._came(_decoder.decode(await self._reader.readexactly(length)))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # this is how the other end goes
        except msgspec.MsgspecError as error:
            logger.error("cost meter: side process: a message could not be read: %s", error)
        finally:
            self.close()

    def close(self) -> None:
        """Close this end. Idempotent."""
        self._writer.close()
        for task in self._answering:
            task.cancel()
        for future in self._asked.values():
            if not future.done():
                future.set_exception(AwayError("the other process is gone"))
                future.exception()  # nobody may be waiting any more

    async def ask(self, name: str, given: object, type: type[T], timeout_s: float) -> T:
        """Return the answer to a question.

        Raises AwayError if the other end is gone, TimeoutError if it takes too long, RefusedError
        if it cannot answer.
        """
        if self._writer.transport.get_write_buffer_size() > UNREAD_BYTES_MAX:
            raise AwayError("the other process does not read what it is asked")
        self._next_id += 1
        id = self._next_id
        future: asyncio.Future[msgspec.Raw] = asyncio.get_running_loop().create_future()
        self._asked[id] = future
        try:
            self._send(AskMessage(id, name, msgspec.Raw(_encode(given))))
            return decoded(await asyncio.wait_for(future, timeout_s), type)
        finally:
            del self._asked[id]

    def tell(self, name: str, value: object) -> None:
        """Send news. It is lost if the other end is gone."""
        if not self._writer.is_closing():
            self._send(NewsMessage(name, msgspec.Raw(_encode(value))))

    def _send(self, message: Message) -> None:
        if self._writer.is_closing():
            raise AwayError("the other process is gone")
        data = _encode(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES) + data)

    def _came(self, message: Message) -> None:
        if isinstance(message, AskMessage):
            task = asyncio.create_task(self._answer_to(message))
            self._answering.add(task)
            task.add_done_callback(self._answering.discard)
        elif isinstance(message, NewsMessage):
            self._take_contained(message)
        else:
            # Nobody waits any more for what came too late.
            future = self._asked.get(message.id)
            if future is None or future.done():
                return
            if isinstance(message, AnswerMessage):
                future.set_result(message.value)
            else:
                future.set_exception(RefusedError(message.kind, message.reason))

    def _take_contained(self, news: NewsMessage) -> None:
        try:
            self._take(news.name, news.value)
        except Exception:
            logger.exception("cost meter: side process: the news %r could not be taken", news.name)

    async def _answer_to(self, asked: AskMessage) -> None:
        try:
            value = True if asked.name == PING else await self._answer(asked.name, asked.given)
            reply: Message = AnswerMessage(asked.id, msgspec.Raw(_bounded(_encode(value))))
        except Exception as error:  # noqa: BLE001 - the other end decides what it means
            reply = RefusalMessage(asked.id, _kind_of(error), str(error))
        try:
            self._send(reply)
        except AwayError:
            pass  # nobody is left to be answered


def _kind_of(error: Exception) -> str:
    return error.kind if isinstance(error, RefusedError) else type(error).__name__


def _bounded(value: bytes) -> bytes:
    if len(value) > MESSAGE_BYTES_MAX // 2:
        raise ValueError(f"the answer has {len(value)} bytes, more than may be sent")
    return value
