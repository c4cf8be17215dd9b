"""Goal: of the tokens that were computed, those that nobody got stand apart, with their time.

Drafts that were rejected; what vLLM cut off behind the end of a request in its last step; and what
the steps in flight computed for a request that was aborted. Every test runs on both meters.
"""

from types import ModuleType

import pytest

from vllm_cost_meter.attribution import _native, step_meter_py
from vllm_cost_meter.records.accrued import Accrued

NOW = 0  # where the clock does not matter


@pytest.fixture(params=[_native, step_meter_py], ids=["native", "twin"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


@pytest.fixture
def meter(impl):
    """Return a meter with a request "a" of 8 prompt tokens, whose first token is there."""
    meter = impl.StepMeter("tokens")
    meter.open("a", 8)
    meter.settle(meter.begin({"a": 8}, NOW), 80)
    return meter


def rejected(accrued: Accrued) -> tuple[int, int]:
    return accrued.rejected_tokens, accrued.rejected_ns


def cut(accrued: Accrued) -> tuple[int, int]:
    return accrued.cut_tokens, accrued.cut_ns


class TestRejectedDrafts:
    def test_they_are_computed_and_stand_apart_with_their_part_of_the_share(self, meter):
        meter.settle(meter.begin({"a": 5}, NOW), 50, {"a": 3})
        accrued = meter.close("a", NOW)
        assert (accrued.decode_tokens, accrued.decode_ns) == (5, 50)
        assert rejected(accrued) == (3, 30)
        assert cut(accrued) == (0, 0)

    def test_their_positions_are_computed_again(self, meter):
        meter.settle(meter.begin({"a": 5}, NOW), 50, {"a": 3})
        assert meter.step_parts(meter.begin({"a": 1}, NOW)) == [("a", 1, 10, 8)]

    def test_at_least_one_token_of_a_step_is_none(self, meter):
        meter.settle(meter.begin({"a": 5}, NOW), 50, {"a": 9})
        assert rejected(meter.close("a", NOW)) == (4, 40)


class TestTokensCutOff:
    def test_they_stand_apart_with_their_part_of_the_share_of_the_last_step(self, meter):
        meter.settle(meter.begin({"a": 5}, NOW), 500)
        meter.settle(meter.begin({"a": 5, "b": 5}, NOW), 100, {"a": 1})
        meter.trim("a", 3)
        accrued = meter.close("a", NOW)
        assert (accrued.decode_tokens, accrued.decode_ns) == (10, 550)
        assert rejected(accrued) == (1, 10)
        assert cut(accrued) == (3, 30)

    def test_a_share_that_does_not_divide_is_rounded_down(self, meter):
        meter.settle(meter.begin({"a": 3}, NOW), 100)
        meter.trim("a", 1)
        assert cut(meter.close("a", NOW)) == (1, 33)

    def test_no_more_are_cut_than_were_kept(self, meter):
        meter.settle(meter.begin({"a": 5}, NOW), 50, {"a": 2})
        meter.trim("a", 9)
        meter.trim("a", 1)
        assert cut(meter.close("a", NOW)) == (3, 30)

    def test_of_a_step_shared_in_parts_they_have_their_part_of_the_last(self, meter):
        step = meter.begin({"a": 2}, NOW)
        meter.share(step, 1_000)
        meter.settle(step, 100)
        meter.trim("a", 1)
        assert cut(meter.close("a", NOW)) == (1, 50)

    def test_a_step_in_flight_behind_it_has_no_part_in_it(self, meter):
        last = meter.begin({"a": 2}, NOW)
        behind = meter.begin({"a": 2}, NOW)
        meter.settle(last, 100)
        meter.trim("a", 1)
        assert cut(meter.close("a", NOW)) == (1, 50)
        assert meter.settle(behind, 30) == 30, "which is tail"

    def test_they_are_known_after_the_hour_was_cut_too(self, meter):
        meter.settle(meter.begin({"a": 4}, NOW), 100)
        ((_, before),) = meter.cut(NOW)
        meter.trim("a", 2)
        assert (cut(before), cut(meter.close("a", NOW))) == ((0, 0), (2, 50))

    def test_each_hour_has_its_own(self, meter):
        meter.settle(meter.begin({"a": 4}, NOW), 100)
        meter.trim("a", 2)
        assert [cut(accrued) for _, accrued in meter.cut(NOW)] == [(2, 50)]
        assert cut(meter.close("a", NOW)) == (0, 0)

    def test_a_request_without_a_step_has_none(self, meter):
        meter.open("b", 1)
        meter.trim("b", 2)
        assert cut(meter.close("b", NOW)) == (0, 0)

    def test_a_request_that_is_not_open_is_refused(self, meter):
        with pytest.raises(ValueError, match="StepMeter: expected an open request, got 'b'"):
            meter.trim("b", 1)

    @pytest.mark.parametrize("tokens", [-1, 2**31, 0.5])
    def test_a_count_out_of_range_is_refused(self, meter, tokens):
        with pytest.raises(ValueError, match="StepMeter.trim: tokens: expected an int from 0 to"):
            meter.trim("a", tokens)


class TestStepsInFlightOfAnAbortedRequest:
    def test_what_they_decode_is_cut_too_with_all_its_time(self, meter):
        first, second = meter.begin({"a": 1, "b": 1}, NOW), meter.begin({"a": 1, "b": 1}, NOW)
        meter.leave("a")
        meter.settle(first, 20)
        meter.settle(second, 40)
        accrued = meter.close("a", NOW)
        assert (accrued.decode_tokens, accrued.decode_ns) == (2, 30)
        assert cut(accrued) == (2, 30)
        assert cut(meter.close("b", NOW)) == (0, 0)

    def test_what_was_decoded_before_is_not(self, meter):
        meter.settle(meter.begin({"a": 1}, NOW), 10)
        step = meter.begin({"a": 1}, NOW)
        meter.leave("a")
        meter.settle(step, 10)
        assert cut(meter.close("a", NOW)) == (1, 10)

    def test_drafts_that_were_rejected_are_counted_as_that(self, meter):
        step = meter.begin({"a": 5}, NOW)
        meter.leave("a")
        meter.settle(step, 50, {"a": 2})
        meter.trim("a", 1)
        accrued = meter.close("a", NOW)
        assert rejected(accrued) == (2, 20)
        assert cut(accrued) == (3, 30)

    def test_a_prompt_that_is_being_computed_is_prefill_as_ever(self, impl):
        meter = impl.StepMeter("tokens")
        meter.open("a", 8)
        prefill, decode = meter.begin({"a": 8}, NOW), meter.begin({"a": 1}, NOW)
        meter.leave("a")
        meter.settle(prefill, 80)
        meter.settle(decode, 10)
        accrued = meter.close("a", NOW)
        assert (accrued.prefill_tokens, accrued.prefill_ns) == (8, 80)
        assert cut(accrued) == (1, 10)

    @pytest.mark.parametrize("place", range(3))
    def test_its_place_among_those_that_decode_does_not_matter(self, impl, place):
        meter = impl.StepMeter("tokens")
        decoding = ["b", "c"]
        decoding.insert(place, "a")
        step = meter.begin({"d": 3}, NOW, decoding)
        meter.leave("a")
        meter.settle(step, 60)
        assert [cut(meter.close(name, NOW)) for name in "abcd"] == [(1, 10), *[(0, 0)] * 3]

    def test_a_step_that_got_no_result_counts_nothing(self, meter):
        meter.begin({"a": 1}, NOW)
        meter.leave("a")
        meter.abandon()
        assert cut(meter.close("a", NOW)) == (0, 0)
