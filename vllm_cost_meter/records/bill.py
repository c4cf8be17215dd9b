"""The bill of one engine request, and its JSON form on the way from engine to API server.

Bills are named tuples because the engine makes them between two steps. A frozen dataclass would
take four times as long. The JSON is an array of the fields in order, which is safe because both
ends run the same version. msgspec writes it in a tenth of the time that `json` takes, and checks
it when it is read.

Invariant: `read_bill(write_bill(bill)) == bill`; any other text raises a ValueError.
"""

from typing import NamedTuple, Self

import msgspec

from vllm_cost_meter.records.accrued import Accrued
from vllm_cost_meter.units.time import NS_PER_MS

# The key under which a bill rides in a request's trace headers. HTTP header syntax, lower case,
# because vLLM hands trace headers to the OpenTelemetry propagator, which ignores unknown names.
BILL_KEY = "x-cost-meter-bill"
# Late bills travel in outputs with this request id. vLLM skips outputs with unknown ids.
CARRIER_ID = "cost-meter-late-bills"


class UsagePiece(NamedTuple):
    """The part of a bill that falls into one UTC hour; fields as in `Accrued`.

    `hour` counts hours since the epoch. `kv_block_ms` is KV cache blocks x milliseconds, because
    in nanoseconds a large server's total would not fit 64 bits. `saved_estimate_ns` is the GPU
    time that the cached tokens would have taken, as the cost model predicted when it was billed.
    `charge_error_ns` is how much of its GPU time may belong to other requests, by what the cost
    model said of itself then; None where that is unknown, which is so for all pieces or for none.
    """

    hour: int
    prefill_ns: int
    decode_ns: int
    prefill_tokens: int
    decode_tokens: int
    marginal_ns: int = 0
    recomputed_ns: int = 0
    recomputed_tokens: int = 0
    rejected_ns: int = 0
    rejected_tokens: int = 0
    cut_ns: int = 0
    cut_tokens: int = 0
    kv_block_ms: int = 0
    step_ns: int = 0
    saved_estimate_ns: int = 0
    charge_error_ns: int | None = None

    @property
    def gpu_time_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    @property
    def charges_known(self) -> tuple[int, int]:
        """Return the GPU-ns whose error is known, and that error, so that pieces add up."""
        if self.charge_error_ns is None:
            return 0, 0
        return self.gpu_time_ns, self.charge_error_ns

    @classmethod
    def of(cls, hour: int, used: Accrued) -> Self:
        """Return the piece for an hour in which the request used `used`."""
        return cls(hour, *used[:11], used.kv_block_ns // NS_PER_MS, used.step_ns)


class Bill(NamedTuple):
    """The final account of one engine request, numbered `seq` (from 1) within its run.

    `batch` is the number of requests in a step, summed over the request's steps. `first_model` and
    `last_model` are versions of the cost model: the one in use when the request came, and the one
    in use when it was billed. `cached_tokens` were in the engine's own prefix cache.
    `external_tokens` came over a KV connector; None if that is unknown, and then `cached_tokens`
    may contain some.
    """

    run_id: str
    seq: int
    request_id: str
    engine_status: str
    method: str
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    steps: int
    batch: int
    first_model: int
    last_model: int
    pieces: tuple[UsagePiece, ...]
    external_tokens: int | None = None

    @property
    def prefill_ns(self) -> int:
        return self.sum_of("prefill_ns")

    @property
    def decode_ns(self) -> int:
        return self.sum_of("decode_ns")

    @property
    def gpu_time_ns(self) -> int:
        return self.prefill_ns + self.decode_ns

    @property
    def marginal_ns(self) -> int:
        return self.sum_of("marginal_ns")

    def sum_of(self, name: str) -> int:
        """Return the sum of a field over the pieces."""
        return sum(getattr(piece, name) for piece in self.pieces)

    def whole(self) -> UsagePiece:
        """Return all pieces added up, as a piece in the first one's hour."""
        if len(self.pieces) == 1:  # as most have
            return self.pieces[0]
        if not self.pieces:
            return UsagePiece(0, 0, 0, 0, 0)
        _, *amounts = map(sum, zip(*(piece[:-1] for piece in self.pieces), strict=True))
        errors = [piece.charge_error_ns for piece in self.pieces]
        error = None if None in errors else sum(ns for ns in errors if ns is not None)
        return UsagePiece._make((self.pieces[0].hour, *amounts, error))


_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Bill).decode


def write_bill(bill: Bill) -> str:
    """Return a bill as one line of JSON."""
    return _encode(bill).decode()


def read_bill(text: str) -> Bill:
    """Parse the text that `write_bill` made. Raises ValueError for any other text."""
    try:
        bill = _decode(text)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(f"expected the text of a bill, got {text[:80]!r}: {error}") from None
    if bill.seq < 1:
        raise ValueError(f"a bill's seq starts at 1, got {bill.seq}")
    if (bill.external_tokens or 0) < 0:
        raise ValueError(f"external tokens cannot be negative, got {bill.external_tokens}")
    if any((amount or 0) < 0 for _, *amounts in bill.pieces for amount in amounts):
        raise ValueError(f"a bill's pieces cannot be negative, got {bill.pieces}")
    return bill
