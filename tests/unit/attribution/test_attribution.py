"""The native attribution does what its twin `step_meter_py.py` states: each test runs on both."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest

from vllm_cost_meter import attribution
from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.attribution.cost_model import FIT_TERMS
from vllm_cost_meter.records.accrued import Accrued

# What the chooser takes, asked in a fresh process.
CHOSEN = (
    "from vllm_cost_meter.attribution import NATIVE, StepMeter; print(NATIVE, StepMeter.__module__)"
)


NOW = 0  # where the clock does not matter


def used(accrued: Accrued) -> tuple[int, int, int, int, int]:
    """Return prefill ns, decode ns, prefill tokens, decode tokens, steps."""
    return (*accrued[:4], accrued.steps)


@pytest.fixture(params=[_native, step_meter_py], ids=["native", "twin"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture
def meter(impl):
    return impl.StepMeter("tokens")


def run_python(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "COST_METER_PURE_PYTHON"}
    root = str(Path(attribution.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**inherited, "PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


class TestChooser:
    def test_native_is_the_one_loaded(self):
        assert run_python(CHOSEN).stdout.split() == ["True", "vllm_cost_meter.attribution._native"]
        assert _native.__file__.endswith(sysconfig.get_config_var("EXT_SUFFIX"))

    def test_twin_is_loaded_when_asked_for(self):
        chosen = run_python(CHOSEN, COST_METER_PURE_PYTHON="1")
        assert chosen.stdout.split() == ["False", "vllm_cost_meter.attribution.step_meter_py"]

    def test_missing_native_is_an_error_that_says_what_to_do_and_never_the_twin(self):
        broken = "import sys; sys.modules['vllm_cost_meter.attribution._native'] = None\n" + CHOSEN
        failed = run_python(broken)
        assert failed.returncode == 1
        assert "ImportError: expected the native module" in failed.stderr
        for advice in ("pip install .", "C compiler", "COST_METER_PURE_PYTHON=1"):
            assert advice in failed.stderr

    def test_both_have_the_same_methods_and_names(self):
        assert _native.METHODS == step_meter_py.METHODS == ("shapley", "tokens", "equal")
        public = {name for name in dir(step_meter_py.StepMeter("equal")) if name[0] != "_"}
        assert public == {name for name in dir(_native.StepMeter) if name[0] != "_"}


class TestSplit:
    @pytest.mark.parametrize(
        ("total_ns", "weights", "shares"),
        [
            (10, [1, 1, 1], [3, 3, 4]),
            (10, [2, 1], [6, 4]),
            (10, [1, 2], [3, 7]),
            (7, [0, 5, 0], [0, 7, 0]),
            (1, [1, 1], [0, 1]),
            (0, [3, 4], [0, 0]),
            (0, [], []),
            (7, [0, 0], [3, 4]),
            (2**63 - 1, [2**31 - 1], [2**63 - 1]),
            (2**63 - 1, [2**31 - 2, 1], [9223372032559808508, 4294967299]),
        ],
    )
    def test_shares_add_up_by_cumulative_rounding(self, impl, total_ns, weights, shares):
        assert impl.split(total_ns, weights) == shares
        assert sum(shares) == total_ns

    def test_weights_may_be_any_sequence(self, impl):
        assert impl.split(10, (1, 1)) == [5, 5]
        assert impl.split(6, range(1, 4)) == [1, 2, 3]

    @pytest.mark.parametrize(
        ("total_ns", "weights", "message"),
        [
            (-1, [1], "split: total_ns: expected an int from 0 to 9223372036854775807, got -1"),
            (2**63, [1], "split: total_ns: expected .* got 9223372036854775808"),
            (1.5, [1], "split: total_ns: expected .* got 1.5"),
            (1, [1, -2], "split: a weight: expected an int from 0 to 2147483647, got -2"),
            (1, [2**31], "split: a weight: expected .* got 2147483648"),
            (1, [2**70], f"split: a weight: expected .* got {2**70}"),
            (1, ["1"], "split: a weight: expected .* got '1'"),
            (1, [2**30, 2**30], "split: the sum of the weights: expected .* got 2147483648"),
            (5, [], "split: expected at least one weight for 5 ns, got none"),
        ],
    )
    def test_errors_name_expected_and_got(self, impl, total_ns, weights, message):
        with pytest.raises(ValueError, match=message):
            impl.split(total_ns, weights)


class TestStep:
    def test_tokens_weigh_by_tokens_and_equal_by_one(self, impl):
        for method, a_and_b in (("tokens", (75, 25)), ("equal", (50, 50))):
            meter = impl.StepMeter(method)
            meter.open("a", 3)
            meter.open("b", 1)
            assert meter.settle(meter.begin({"a": 3, "b": 1}, NOW), 100) == 0
            assert meter.open_ns == 100
            assert (meter.close("a", NOW)[0], meter.close("b", NOW)[0]) == a_and_b
            assert meter.open_ns == 0

    def test_unknown_method_is_refused(self, impl):
        for method in ("fair", None, 3):
            with pytest.raises(
                ValueError, match=r"expected a method of \('shapley', 'tokens', 'equal'\), got"
            ):
                impl.StepMeter(method)

    def test_steps_are_numbered_from_one(self, meter):
        assert [meter.begin(batch, NOW) for batch in ({"a": 1}, {}, {"a": 1})] == [1, 2, 3]
        assert meter.steps_in_flight == 3
        assert [len(meter.step_parts(step)) for step in (1, 2, 3)] == [1, 0, 1]

    def test_prompt_in_chunks_is_prefill_and_the_rest_decode(self, meter):
        meter.open("a", 5)
        meter.position("a", 0, False)
        for tokens in (3, 2, 1, 1):
            meter.settle(meter.begin({"a": tokens}, NOW), 100)
        assert used(meter.accrued("a", NOW)) == (200, 200, 5, 2, 4)

    def test_cached_prompt_starts_where_the_cache_ends(self, meter):
        meter.open("a", 5)
        meter.position("a", 4, False)
        meter.settle(meter.begin({"a": 1}, NOW), 10)
        meter.settle(meter.begin({"a": 1}, NOW), 20)
        assert used(meter.close("a", NOW)) == (10, 20, 1, 1, 2)

    def test_recomputing_after_a_preemption_is_prefill(self, meter):
        meter.open("a", 2)
        for tokens in (2, 1, 1):  # reaches position 4
            meter.settle(meter.begin({"a": tokens}, NOW), 10)
        meter.position("a", 1, True)
        for tokens in (2, 2, 1):  # from 1, 3 and 5
            meter.settle(meter.begin({"a": tokens}, NOW), 100)
        assert used(meter.close("a", NOW)) == (210, 120, 6, 3, 6)

    def test_a_preemption_amid_recomputing_forgets_nothing_that_was_reached_before(self, meter):
        meter.open("a", 2)
        for tokens in (2, 1, 1):  # reaches position 4
            meter.settle(meter.begin({"a": tokens}, NOW), 10)
        meter.position("a", 0, True)
        meter.settle(meter.begin({"a": 1}, NOW), 10)
        meter.position("a", 0, True)
        meter.settle(meter.begin({"a": 5}, NOW), 50)
        accrued = meter.close("a", NOW)
        assert (accrued.recomputed_tokens, accrued.recomputed_ns) == (1 + 4, 10 + 40)

    def test_recomputing_that_is_not_charged_is_counted_and_belongs_to_nobody(self, impl):
        meter = impl.StepMeter("tokens", charges_recomputed=False)
        meter.open("a", 2)
        meter.open("b", 2)
        for tokens in (2, 1, 1):  # reaches position 4
            meter.settle(meter.begin({"a": tokens}, NOW), 10)
        meter.position("a", 0, True)
        assert meter.share(meter.begin({"a": 6, "b": 2}, NOW), 80) == 0
        assert (meter.uncharged_ns, meter.open_ns) == (40, 30 + 40)
        assert meter.open_gpu_ns() == {"a": 30 + 20, "b": 20}
        assert meter.settle(4, 8) == 0
        accrued = meter.close("a", NOW)
        assert (accrued.prefill_ns, accrued.decode_ns) == (10 + 20 + 2, 20)
        assert (accrued.recomputed_ns, accrued.recomputed_tokens) == (44, 4)
        assert (meter.uncharged_ns, meter.open_ns) == (44, 22)

    def test_a_cut_has_a_request_that_only_recomputed_and_was_not_charged(self, impl):
        meter = impl.StepMeter("tokens", charges_recomputed=False)
        meter.open("a", 4)
        meter.settle(meter.begin({"a": 4}, NOW), 10)
        meter.cut(NOW)
        meter.position("a", 0, True)
        meter.share(meter.begin({"a": 2}, NOW), 10)
        [(_, accrued)] = meter.cut(NOW)
        assert (accrued.prefill_ns, accrued.recomputed_ns) == (0, 10)
        assert meter.accrued("a", NOW).recomputed_ns == 0

    def test_phase_is_that_of_the_beginning_of_the_step(self, meter):
        meter.open("a", 2)
        first = meter.begin({"a": 2}, NOW)
        second = meter.begin({"a": 1}, NOW)
        meter.settle(first, 10)
        meter.settle(second, 20)
        assert used(meter.close("a", NOW)) == (10, 20, 2, 1, 2)

    def test_no_tokens_at_all_is_an_equal_split_and_counted(self, meter):
        meter.open("a", 0)
        meter.open("b", 0)
        meter.settle(meter.begin({"a": 0, "b": 0}, NOW), 10)
        assert meter.fallbacks == 1
        assert used(meter.close("a", NOW)) == (0, 5, 0, 0, 1)

    def test_request_without_tokens_pays_nothing(self, meter):
        meter.open("a", 0)
        meter.open("b", 0)
        meter.settle(meter.begin({"a": 0, "b": 2}, NOW), 10)
        assert meter.fallbacks == 0
        assert used(meter.accrued("a", NOW)) == (0, 0, 0, 0, 1)

    @pytest.mark.parametrize("coefficient", [sys.float_info.min, 1e-300, 1e-12])
    def test_a_model_that_knows_next_to_no_time_shares_equally(self, impl, coefficient):
        meter = impl.StepMeter("shapley")
        meter.adopt(((0.0,) * 5, (0.0,) * 5), (coefficient, *[0.0] * (FIT_TERMS - 1)), False)
        meter.settle(meter.begin({"a": 1, "b": 3}, NOW), 400)
        assert [used(meter.close(name, NOW))[:2] for name in "ab"] == [(0, 200), (0, 200)]
        assert meter.fallbacks == 1

    def test_time_of_an_empty_step_is_tail(self, meter):
        step = meter.begin({}, NOW)
        assert meter.share(step, 3) == 3
        assert meter.settle(step, 4) == 4
        assert (meter.open_ns, meter.fallbacks, meter.steps_in_flight) == (0, 0, 0)

    def test_share_divides_time_without_ending_the_step(self, meter):
        meter.open("a", 1)
        step = meter.begin({"a": 1}, NOW)
        assert meter.share(step, 10) == 0
        assert meter.steps_in_flight == 1
        assert [(i, *used(a)) for i, a in meter.cut(NOW)] == [("a", 10, 0, 0, 0, 0)]
        assert meter.settle(step, 5) == 0
        assert used(meter.close("a", NOW)) == (5, 0, 1, 0, 1)

    def test_step_without_a_result_is_dropped_by_a_later_one(self, meter):
        meter.open("a", 0)
        meter.open("b", 0)
        meter.begin({"a": 1}, NOW)
        meter.settle(meter.begin({"b": 1}, NOW), 10)
        assert meter.steps_in_flight == 0
        assert used(meter.accrued("a", NOW)) == (0, 0, 0, 0, 0)
        assert meter.leave("a") is True

    def test_dict_may_change_after_begin(self, meter):
        scheduled = {"a": 1, "b": 1}
        step = meter.begin(scheduled, NOW)
        scheduled.clear()
        meter.settle(step, 10)
        assert used(meter.close("b", NOW)) == (0, 5, 0, 1, 1)

    def test_step_not_in_flight_is_refused(self, meter):
        settled = meter.begin({"a": 1}, NOW)
        meter.settle(settled, 1)
        for step in (settled, 0, 2, -1, 2**70, 1.0, None):
            for ask in (
                lambda n: meter.settle(n, 1),
                lambda n: meter.share(n, 1),
                meter.step_parts,
            ):
                with pytest.raises(ValueError, match="StepMeter: expected a step in flight, got"):
                    ask(step)

    def test_refused_time_changes_nothing(self, meter):
        older, step = meter.begin({"a": 1}, NOW), meter.begin({"a": 1}, NOW)
        for gpu_ns in (-1, 2**63, 1.5):
            with pytest.raises(ValueError, match="StepMeter: gpu_ns: expected an int from 0 to"):
                meter.settle(step, gpu_ns)
        assert meter.steps_in_flight == step - older + 1
        assert used(meter.accrued("a", NOW)) == (0, 0, 0, 0, 0)

    def test_unbilled_time_beyond_64_bits_is_refused(self, meter):
        step = meter.begin({"a": 1, "b": 1}, NOW)
        meter.share(step, 2**63 - 1)
        with pytest.raises(ValueError, match="expected an int from 0 to 0, got 1"):
            meter.share(step, 1)
        assert meter.close("a", NOW)[1] + meter.close("b", NOW)[1] == 2**63 - 1
        assert meter.settle(step, 2**63 - 1) == 2**63 - 1

    @pytest.mark.parametrize("tokens", [-1, 2**31, 2**70, 1.0, None])
    def test_refused_tokens_record_nothing(self, meter, tokens):
        meter.open("a", 10)
        with pytest.raises(ValueError, match=r"begin: tokens of 'c': expected an int from 0 to"):
            meter.begin({"a": 1, "b": 1, "c": tokens, "d": -1}, NOW)
        assert meter.request_ids() == ["a"]
        assert (meter.steps_in_flight, meter.strangers) == (0, 0)
        assert meter.leave("a") is True
        assert meter.begin({"a": 1}, NOW) == 1

    def test_tokens_of_a_step_have_a_limit(self, meter):
        with pytest.raises(ValueError, match="tokens of all requests: expected .* got 2147483648"):
            meter.begin({"a": 2**31 - 1, "b": 1}, NOW)
        assert meter.begin({"a": 2**31 - 2, "b": 1}, NOW) == 1

    def test_steps_in_flight_have_a_limit(self, meter):
        for _ in range(1024):
            meter.begin({"a": 1}, NOW)
        with pytest.raises(ValueError, match="expected less than 1024 steps in flight"):
            meter.begin({"a": 1}, NOW)
        meter.abandon()
        assert (meter.steps_in_flight, meter.begin({"a": 1}, NOW)) == (0, 1025)

    def test_batches_may_be_huge_and_shrink_again(self, meter):
        ids = [f"r{n}" for n in range(5000)]
        for request_id in ids:
            meter.open(request_id, 1)
        for count in (1, 5000, 3, 5000, 70):
            step = meter.begin(dict.fromkeys(ids[:count], 2), NOW)
            assert len(meter.step_parts(step)) == count
            assert meter.settle(step, 10**9 + 7) == 0
        assert meter.open_ns == 5 * (10**9 + 7)
        assert sum(sum(meter.close(request_id, NOW)[:2]) for request_id in ids) == 5 * (10**9 + 7)


class TestOrderOfRequests:
    """The native one guesses who comes next; whatever the order, it must find the right request."""

    def check(self, meter, batches):
        expected = dict.fromkeys(meter.request_ids(), 0)
        for batch in batches:
            meter.settle(meter.begin({copy_of(i): 1 + int(i) for i in batch}, NOW), 0)
            for request_id in batch:
                expected[request_id] += 1 + int(request_id)
        assert {i: meter.accrued(i, NOW)[3] for i in expected} == expected

    def test_batches_that_shuffle_shrink_grow_and_alternate(self, meter):
        ids = [str(n) for n in range(40)]
        for request_id in ids:
            meter.open(request_id, 0)
        batches = [ids, ids[::-1], ids[::3], ids, [], ids[5:] + ids[:5], ids[20:], ids[:20]]
        self.check(meter, batches * 2 + [ids[:20], ids[20:]] * 3)

    def test_equal_ids_need_not_be_the_same_object(self, meter):
        meter.open("1", 0)
        self.check(meter, [["1"]] * 5)

    def test_pipeline_with_many_steps_in_flight(self, meter):
        ids = [str(n) for n in range(30)]
        in_flight = []
        for number in range(100):
            in_flight.append(meter.begin(dict.fromkeys(ids[number % 5 :: 5], 1), NOW))
            if len(in_flight) == 5 + number // 10:
                meter.settle(in_flight.pop(0), 6)
        assert meter.steps_in_flight == len(in_flight)
        assert {sum(meter.accrued(i, NOW)[:2]) for i in ids} <= {17, 18}


def copy_of(text):
    return "".join(list(text))


class TestRequest:
    def test_open_twice_is_open_once(self, meter):
        meter.open("a", 5)
        meter.open("a", 7)
        assert (meter.open_requests, meter.request_ids()) == (1, ["a"])
        meter.settle(meter.begin({"a": 5}, NOW), 1)
        meter.settle(meter.begin({"a": 5}, NOW), 1)
        assert used(meter.close("a", NOW)) == (1, 1, 5, 5, 2)

    def test_stranger_is_opened_as_it_comes_and_counted(self, meter):
        meter.open("a", 0)
        meter.settle(meter.begin({"x": 1, "a": 1, "y": 2}, NOW), 4)
        meter.position("z", 3, False)
        assert meter.strangers == 3
        assert meter.request_ids() == ["a", "x", "y", "z"]
        assert used(meter.accrued("y", NOW)) == (0, 2, 0, 2, 1)

    @pytest.mark.parametrize(
        ("name", "more"), [("close", [NOW]), ("leave", []), ("accrued", [NOW]), ("discard", [])]
    )
    def test_request_that_is_not_open_is_refused(self, meter, name, more):
        with pytest.raises(ValueError, match="StepMeter: expected an open request, got 'a'"):
            getattr(meter, name)("a", *more)

    @pytest.mark.parametrize("tokens", [-1, 2**31, 0.5])
    def test_refused_counts_of_open_and_position(self, meter, tokens):
        with pytest.raises(ValueError, match="open: prompt_tokens: expected an int from 0 to"):
            meter.open("a", tokens)
        with pytest.raises(
            ValueError, match="position: computed_tokens: expected an int from 0 to"
        ):
            meter.position("a", tokens, False)
        assert (meter.open_requests, meter.strangers) == (0, 0)

    def test_shares_of_a_closed_request_are_tail(self, meter):
        meter.open("a", 0)
        meter.open("b", 0)
        first, second = meter.begin({"a": 1, "b": 1}, NOW), meter.begin({"a": 1, "b": 1}, NOW)
        meter.settle(first, 10)
        assert used(meter.close("a", NOW)) == (0, 5, 0, 1, 1)
        assert meter.share(second, 20) == 10
        assert meter.settle(second, 30) == 15
        assert used(meter.close("b", NOW)) == (0, 30, 0, 2, 2)
        assert meter.open_ns == 0

    def test_id_that_comes_again_is_another_request(self, meter):
        meter.open("a", 0)
        old = meter.begin({"a": 1}, NOW)
        meter.close("a", NOW)
        meter.open("a", 0)
        new = meter.begin({"a": 1}, NOW)
        assert meter.settle(old, 10) == 10
        assert used(meter.accrued("a", NOW)) == (0, 0, 0, 0, 0)
        assert meter.settle(new, 20) == 0
        assert used(meter.close("a", NOW)) == (0, 20, 0, 1, 1)

    def test_discard_forgets_without_a_bill(self, meter):
        step = meter.begin({"a": 1, "b": 1}, NOW)
        meter.share(step, 10)
        assert meter.discard("a") == 5
        assert (meter.request_ids(), meter.open_ns) == (["b"], 5)
        assert meter.settle(step, 10) == 5

    def test_cut_takes_what_accrued_and_leaves_the_requests_open(self, meter):
        for request_id in ("a", "b", "c"):
            meter.open(request_id, 1)
        meter.settle(meter.begin({"b": 1, "a": 1}, NOW), 11)
        pieces = [(i, *used(accrued)) for i, accrued in meter.cut(NOW)]
        assert pieces == [("a", 6, 0, 1, 0, 1), ("b", 5, 0, 1, 0, 1)]
        assert (meter.open_ns, meter.cut(NOW)) == (0, [])
        meter.settle(meter.begin({"a": 1}, NOW), 3)
        assert used(meter.close("a", NOW)) == (0, 3, 0, 1, 1)

    def test_aborted_request_without_steps_can_be_closed_at_once(self, meter):
        meter.open("a", 1)
        assert meter.leave("a") is True
        assert meter.drained() == []

    def test_aborted_request_accrues_until_its_last_step_has_ended(self, meter):
        meter.open("a", 1)
        first, second = meter.begin({"a": 1}, NOW), meter.begin({"a": 1}, NOW)
        assert meter.leave("a") is False
        assert meter.settle(first, 10) == 0
        assert meter.drained() == []
        assert meter.settle(second, 10) == 0
        assert meter.drained() == ["a"]
        assert meter.drained() == []
        assert used(meter.close("a", NOW)) == (10, 10, 1, 1, 2)

    def test_dropped_steps_drain_too(self, meter):
        meter.begin({"a": 1}, NOW)
        meter.begin({"b": 1}, NOW)
        step = meter.begin({"c": 1}, NOW)
        assert [meter.leave(request_id) for request_id in "cba"] == [False] * 3
        meter.settle(step, 1)
        assert meter.drained() == ["a", "b", "c"]
        meter.begin({"a": 1}, NOW)
        meter.abandon()
        assert meter.drained() == ["a"]

    def test_drained_does_not_name_who_was_closed_or_came_back(self, meter):
        step = meter.begin({"a": 1, "b": 1, "c": 1, "d": 1}, NOW)
        for request_id in "abcd":
            meter.leave(request_id)
        meter.settle(step, 4)
        meter.close("a", NOW)
        meter.open("a", 0)
        meter.begin({"b": 1}, NOW)
        assert meter.leave("c") is True
        assert meter.drained() == ["d"]
        meter.abandon()
        assert meter.drained() == ["b"]

    def test_drained_names_in_the_order_of_first_draining(self, meter):
        meter.begin({"a": 1, "b": 1}, NOW)
        meter.leave("b")
        meter.abandon()
        meter.leave("a")
        meter.begin({"a": 1, "b": 1}, NOW)
        meter.abandon()
        assert meter.drained() == ["b", "a"]

    def test_abandon_keeps_what_was_shared(self, meter):
        step = meter.begin({"a": 2, "b": 2}, NOW)
        meter.share(step, 4)
        meter.close("b", NOW)
        meter.abandon()
        assert (meter.steps_in_flight, meter.open_ns) == (0, 2)
        assert used(meter.accrued("a", NOW)) == (0, 2, 0, 0, 0)
