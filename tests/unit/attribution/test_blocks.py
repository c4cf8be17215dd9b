"""Goal: KV residency is blocks x wall time, and what steps took in all is known, on both meters."""

from types import ModuleType

import pytest

from vllm_cost_meter.attribution import _native, step_meter_py


@pytest.fixture(params=[_native, step_meter_py], ids=["native", "twin"])
def impl(request: pytest.FixtureRequest) -> ModuleType:
    return request.param


def test_a_request_knows_what_its_steps_took_in_all(impl):
    meter = impl.StepMeter("tokens")
    meter.settle(meter.begin({"a": 3, "b": 1}, 0), 100)
    step = meter.begin({"a": 1}, 0)
    meter.share(step, 20)
    meter.settle(step, 30)
    a, b = meter.close("a", 0), meter.close("b", 0)
    assert (a.step_ns, a.decode_ns) == (150, 75 + 50)
    assert (b.step_ns, b.decode_ns) == (100, 25)


class TestBlocks:
    """KV residency: blocks of 16 tokens x wall time, from the step on that needs them."""

    @pytest.fixture
    def meter(self, impl):
        meter = impl.StepMeter("tokens", block_size=16)
        meter.open("a", 20)
        return meter

    def test_a_context_holds_the_blocks_it_fills_from_the_step_that_needs_them(self, meter):
        meter.begin({"a": 20}, 1_000)  # 2 blocks
        meter.begin({"a": 12}, 1_100)  # fills them
        meter.begin({"a": 1}, 1_200)  # the 33rd token: a third one
        assert meter.accrued("a", 1_300).kv_block_ns == 200 * 2 + 100 * 3
        assert meter.close("a", 1_400).kv_block_ns == 200 * 2 + 200 * 3

    def test_a_cached_start_of_a_prompt_is_held_too(self, meter):
        meter.position("a", 160, False)
        meter.begin({"a": 1}, 0)
        assert meter.close("a", 10).kv_block_ns == 11 * 10

    def test_a_preempted_request_holds_none_until_it_runs_again(self, meter):
        meter.begin({"a": 20}, 0)
        meter.release("a", 10)
        meter.position("a", 0, True)
        meter.begin({"a": 20}, 1_000)
        assert meter.close("a", 1_001).kv_block_ns == 2 * 10 + 2 * 1

    def test_rejected_drafts_keep_their_blocks(self, meter):
        meter.settle(meter.begin({"a": 33}, 0), 1, {"a": 32})
        meter.begin({"a": 16}, 10)  # within the three blocks
        assert meter.close("a", 20).kv_block_ns == 3 * 20

    def test_each_hour_has_its_own(self, meter):
        meter.begin({"a": 1}, 0)
        assert [used.kv_block_ns for _, used in meter.cut(10)] == [10]
        assert [used.kv_block_ns for _, used in meter.cut(13)] == [3]
        assert meter.close("a", 20).kv_block_ns == 7

    def test_waiting_requests_hold_none(self, meter):
        assert meter.cut(10**9) == []
        assert meter.close("a", 2 * 10**9).kv_block_ns == 0

    def test_a_step_that_is_refused_takes_no_blocks(self, meter):
        with pytest.raises(ValueError, match="tokens of 'b'"):
            meter.begin({"a": 20, "b": -1}, 0)
        assert meter.close("a", 10).kv_block_ns == 0

    def test_a_clock_that_goes_back_takes_nothing_away(self, meter):
        meter.begin({"a": 1}, 100)
        assert meter.accrued("a", 150).kv_block_ns == 50
        assert meter.accrued("a", 120).kv_block_ns == 50

    def test_more_than_64_bits_is_the_largest_number_there_is(self, meter):
        meter.begin({"a": 2**31 - 1}, 0)
        assert meter.accrued("a", 2**62).kv_block_ns == 2**63 - 1
        assert meter.close("a", 2**63 - 1).kv_block_ns == 2**63 - 1

    def test_nobody_is_released_who_is_not_open(self, meter):
        meter.release("nobody", 0)
        assert meter.request_ids() == ["a"]

    def test_without_a_block_size_nothing_is_counted(self, impl):
        meter = impl.StepMeter("tokens")
        meter.begin({"a": 100}, 0)
        meter.release("a", 5)
        assert meter.close("a", 10).kv_block_ns == 0
