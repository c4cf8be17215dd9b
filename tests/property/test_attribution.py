"""Goal: what design section 3 promises of the attribution holds for any traffic.

Method: splits are checked against exact fractions; both step meters are driven in lockstep through
random lives of requests and steps, where every answer, error text and figure must be the same, and
no nanosecond may appear or vanish.
"""

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.support.priors import COEFFICIENTS, PLANE, PRIORS
from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.attribution.priors import NOTHING_KNOWN
from vllm_cost_meter.records.accrued import Accrued

IMPLEMENTATIONS = [_native, step_meter_py]
TIMES = st.one_of(st.integers(0, 10**11), st.integers(0, 2**63 - 1))
WEIGHTS = st.one_of(
    st.lists(st.integers(0, 3), min_size=1, max_size=40),
    st.lists(st.integers(0, 8192), min_size=1, max_size=12),
    st.lists(st.integers(0, (2**31 - 1) // 6), min_size=1, max_size=6),
)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, ids=["native", "twin"])
class TestSplit:
    @given(total_ns=TIMES, weights=WEIGHTS)
    def test_shares_add_up_and_each_is_within_one_ns_of_its_fair_part(
        self, impl, total_ns, weights
    ):
        shares = impl.split(total_ns, weights)
        assert sum(shares) == total_ns
        if not any(weights):
            weights = [1] * len(weights)
        for share, weight in zip(shares, weights, strict=True):
            assert abs(share - Fraction(total_ns * weight, sum(weights))) < 1

    @given(total_ns=TIMES, weights=WEIGHTS, random=st.randoms(use_true_random=False))
    def test_order_moves_a_share_by_at_most_one_ns(self, impl, total_ns, weights, random):
        order = list(range(len(weights)))
        random.shuffle(order)
        shares = impl.split(total_ns, weights)
        moved = impl.split(total_ns, [weights[k] for k in order])
        for place, k in enumerate(order):
            assert abs(moved[place] - shares[k]) <= 1

    @given(total_ns=TIMES, weights=WEIGHTS)
    def test_equals_pay_equally_to_one_ns(self, impl, total_ns, weights):
        by_weight = {}
        for share, weight in zip(impl.split(total_ns, weights), weights, strict=True):
            by_weight.setdefault(weight, []).append(share)
        for shares in by_weight.values():
            assert max(shares) - min(shares) <= 1


@given(total_ns=st.integers(-2, 2**64), weights=st.lists(st.integers(-1, 2**32), max_size=8))
def test_native_split_equals_twin_also_in_its_errors(total_ns, weights):
    assert outcome(_native.split, total_ns, weights) == outcome(
        step_meter_py.split, total_ns, weights
    )


@given(total_ns=TIMES, weights=WEIGHTS)
def test_native_split_equals_twin(total_ns, weights):
    assert _native.split(total_ns, weights) == step_meter_py.split(total_ns, weights)


def outcome(function, *args):
    """Return what a call returned or raised."""
    try:
        return function(*args)
    except ValueError as error:
        return f"ValueError: {error}"


REQUESTS = [f"request-{n}" for n in range(6)]  # few, so that lives meet
COUNTS = st.one_of(st.integers(0, 3), st.integers(0, 5000))
REJECTED = st.none() | st.dictionaries(
    st.sampled_from([*REQUESTS, "nobody"]), st.integers(-1, 4000), max_size=3
)
ANY_REQUEST = st.sampled_from(REQUESTS)
ENCODED = st.none() | st.dictionaries(
    st.sampled_from([*REQUESTS, "nobody"]), st.integers(0, 2**25) | st.just(-1), max_size=3
)
PASSED_NS = st.one_of(st.integers(-5, 100), st.integers(0, 2**62))
ANY_STEP = st.integers(0, 3)  # how many steps back from the newest


class Lockstep(RuleBasedStateMachine):
    """Native and twin live the same life; `given_ns` and `taken_ns` keep the books of it."""

    @initialize(
        method=st.sampled_from(step_meter_py.METHODS),
        prior=st.just(NOTHING_KNOWN) | PRIORS,
        block_size=st.sampled_from([0, 1, 16, 2**31 - 1]),
        charges=st.booleans(),
    )
    def start(self, method, prior, block_size, charges):
        self.native = _native.StepMeter(method, prior, block_size, charges)
        self.twin = step_meter_py.StepMeter(method, prior, block_size, charges)
        self.charges = charges
        self.now_ns = 10
        self.newest = 0
        self.batch = {}
        self.cut_before = {}  # what was cut at hours of the requests that are open
        self.given_ns = self.taken_ns = 0

    def both(self, name, *args):
        """Call both and return what they agree on: a value, or the text of an error."""
        native = outcome(getattr(self.native, name), *args)
        twin = outcome(getattr(self.twin, name), *args)
        assert native == twin
        assert type(native) is type(twin)
        return native

    @rule(passed_ns=PASSED_NS)
    def the_clock_moves(self, passed_ns):
        self.now_ns = min(max(0, self.now_ns + passed_ns), 2**63 - 1)

    @rule(now_ns=st.sampled_from([-1, 2**63, None]), request_id=ANY_REQUEST)
    def the_clock_is_wrong(self, now_ns, request_id):
        for name, *args in (("begin", {}), ("release", request_id), ("cut",)):
            assert "now_ns: expected an int" in self.both(name, *args, now_ns)

    @rule(request_id=ANY_REQUEST)
    def release(self, request_id):
        self.both("release", request_id, self.now_ns)

    @rule(
        request_id=ANY_REQUEST,
        prompt_tokens=COUNTS,
        has_lora=st.booleans(),
        is_guided=st.booleans(),
    )
    def open(self, request_id, prompt_tokens, has_lora, is_guided):
        self.both("open", request_id, prompt_tokens, has_lora, is_guided)

    @rule(request_id=ANY_REQUEST, computed_tokens=COUNTS, resumed=st.booleans())
    def position(self, request_id, computed_tokens, resumed):
        self.both("position", request_id, computed_tokens, resumed)

    @rule(batch=st.dictionaries(ANY_REQUEST, COUNTS, max_size=6))
    def begin_any_batch(self, batch):
        self.batch = batch
        self.newest = self.both("begin", batch, self.now_ns)

    @rule(
        batch=st.dictionaries(ANY_REQUEST, COUNTS, max_size=6),
        decoding=st.none() | st.lists(ANY_REQUEST, max_size=6, unique=True),
        encoded=ENCODED,
    )
    def begin_with_a_list_of_those_that_decode(self, batch, decoding, encoded):
        batch = {name: tokens for name, tokens in batch.items() if name not in (decoding or ())}
        self.batch = dict.fromkeys(decoding or (), 1) | batch
        begun = self.both("begin", batch, self.now_ns, decoding, encoded)
        if isinstance(begun, int):
            self.newest = begun
        else:
            assert "encoder tokens of" in begun

    @rule(leaving=st.sets(ANY_REQUEST, max_size=2), arriving=st.sets(ANY_REQUEST, max_size=2))
    def begin_much_the_same_batch(self, leaving, arriving):
        kept = {request_id: 1 for request_id in self.batch if request_id not in leaving}
        self.begin_any_batch(kept | dict.fromkeys(sorted(arriving), 7))

    @rule(tokens=st.sampled_from([-1, 2**31, 2**64, None]), place=st.integers(0, 3))
    def begin_wrongly(self, tokens, place):
        batch = dict.fromkeys([*REQUESTS[:place], "someone new", *REQUESTS[place:]], 1)
        batch[REQUESTS[place]] = tokens
        assert "expected an int from 0 to" in self.both("begin", batch, self.now_ns)

    @rule(back=ANY_STEP, gpu_ns=TIMES)
    def share(self, back, gpu_ns):
        self.take_tail(self.both("share", self.newest - back, gpu_ns), gpu_ns)

    @rule(back=ANY_STEP, gpu_ns=TIMES, rejected=REJECTED)
    def settle(self, back, gpu_ns, rejected):
        self.take_tail(self.both("settle", self.newest - back, gpu_ns, rejected), gpu_ns)

    @rule(request_id=ANY_REQUEST, tokens=COUNTS)
    def trim(self, request_id, tokens):
        self.both("trim", request_id, tokens)

    @precondition(lambda self: self.twin.steps_in_flight)
    @rule(gpu_ns=st.integers(0, 10**8))
    def settle_the_oldest(self, gpu_ns):
        step = self.newest - self.twin.steps_in_flight + 1
        self.take_tail(self.both("settle", step, gpu_ns), gpu_ns)

    def take_tail(self, tail_ns, gpu_ns):
        if isinstance(tail_ns, int):
            assert 0 <= tail_ns <= gpu_ns
            self.given_ns += gpu_ns
            self.taken_ns += tail_ns

    @rule(request_id=ANY_REQUEST)
    def close(self, request_id):
        accrued = self.both("accrued", request_id, self.now_ns)
        closed = self.both("close", request_id, self.now_ns)
        assert closed == accrued
        self.cut_before.pop(request_id, None)
        if isinstance(closed, tuple):
            self.taken_ns += closed[0] + closed[1]

    @rule(request_id=ANY_REQUEST)
    def discard(self, request_id):
        discarded_ns = self.both("discard", request_id)
        self.cut_before.pop(request_id, None)
        if isinstance(discarded_ns, int):
            self.taken_ns += discarded_ns

    @rule(request_id=ANY_REQUEST)
    def leave(self, request_id):
        self.both("leave", request_id)

    @rule()
    def drained(self):
        for request_id in self.both("drained"):
            assert self.both("leave", request_id) is True

    @rule()
    def cut(self):
        pieces = self.both("cut", self.now_ns)
        for request_id, accrued in pieces:
            before = self.cut_before.get(request_id, Accrued())
            self.cut_before[request_id] = before.plus(accrued)
        self.taken_ns += sum(sum(accrued[:2]) for _, accrued in pieces)

    @rule()
    def abandon(self):
        self.both("abandon")

    @rule(planes=st.tuples(PLANE, PLANE), coefficients=COEFFICIENTS, two_planes=st.booleans())
    def adopt(self, planes, coefficients, two_planes):
        self.both("adopt", planes, coefficients, two_planes)

    @invariant()
    def all_figures_are_the_same(self):
        for name in (
            "open_ns",
            "uncharged_ns",
            "open_requests",
            "steps_in_flight",
            "fallbacks",
            "strangers",
        ):
            assert getattr(self.native, name) == getattr(self.twin, name), name
        self.both("models", -1)
        self.both("fitted")
        self.both("open_gpu_ns")
        for request_id in self.both("request_ids"):
            accrued = self.both("accrued", request_id, self.now_ns)
            both_ns = self.computed_ns(accrued)
            assert not self.charges or accrued.recomputed_ns <= accrued.prefill_ns
            assert accrued.rejected_ns <= both_ns <= accrued.step_ns
            self.what_nobody_got_was_computed_and_is_counted_once(request_id, accrued)
        for back in range(4):
            self.both("step_parts", self.newest - back)
            self.both("step_features", self.newest - back)

    def computed_ns(self, accrued):
        """The time in which a request was computed, charged or not."""
        return accrued.gpu_time_ns + (0 if self.charges else accrued.recomputed_ns)

    def what_nobody_got_was_computed_and_is_counted_once(self, request_id, accrued):
        # Of the whole life: the end of a request may be found after an hour was cut.
        life = accrued.plus(self.cut_before.get(request_id, Accrued()))
        assert life.rejected_ns + life.cut_ns <= self.computed_ns(life)
        computed = life.prefill_tokens + life.decode_tokens
        assert life.rejected_tokens + life.cut_tokens <= computed

    @invariant()
    def no_nanosecond_appears_or_vanishes(self):
        assert self.given_ns == self.taken_ns + self.native.open_ns + self.native.uncharged_ns
        assert not (self.charges and self.native.uncharged_ns)
        accrued = [self.native.accrued(i, self.now_ns) for i in self.native.request_ids()]
        assert sum(prefill + decode for prefill, decode, *_ in accrued) == self.native.open_ns


TestLockstep = Lockstep.TestCase
TestLockstep.settings = settings(stateful_step_count=50)
