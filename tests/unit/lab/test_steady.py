"""The figures of a steady window, by hand, and what no window may change."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_cost_meter.lab.sweep.steady import Reply, is_too_many, nearest_rank, steady


def reply(sent_s: float, ttft_s: float = 0.5, tokens: int = 5, gap_s: float = 0.25) -> Reply:
    gaps = [gap_s] * (tokens - 1)
    return Reply.of(sent_s, (10, tokens), ttft_s, gaps)


FAILED = Reply(1.0, 1.5, 10, 0, ())


def test_figures_are_those_computed_by_hand():
    found = steady([reply(0.0), reply(1.0), reply(2.0), FAILED], 1.0, 3.0)
    # Tokens at 0.5 to 1.5, 1.5 to 2.5 and 2.5 to 3.5 s: 3 of the first, all of the second and 2 of
    # the third came in [1, 3); the prompts of the second and third were begun in it.
    assert found.output_tokens_per_s == pytest.approx((3 + 5 + 2) / 2)
    assert found.input_tokens_per_s == pytest.approx(20 / 2)
    assert (found.sent, found.failed, found.ended) == (3, 1, 2)
    assert found.arrivals_per_s == pytest.approx(1.5)
    # In the system: 0.5 s of the first, 1.5 s of the second, 1 s of the third, 0.5 s of the failed.
    assert found.concurrency == pytest.approx((0.5 + 1.5 + 1.0 + 0.5) / 2)
    assert found.ttft_p50_ms == found.ttft_p99_ms == pytest.approx(500)
    assert found.tpot_ms == found.tpot_p99_ms == pytest.approx(250)
    assert found.e2e_p99_ms == pytest.approx(1500)
    assert (found.piled_up, found.saturated) == (-2, False)


def test_latencies_are_of_what_was_sent_in_the_window_and_not_of_the_warm_up():
    slow, fast = reply(0.0, ttft_s=9.0), reply(5.0, ttft_s=0.1)
    assert steady([slow, fast], 4.0, 6.0).ttft_p99_ms == pytest.approx(100)


def test_a_reply_that_came_in_larger_chunks_counts_all_its_tokens():
    two_chunks = Reply.of(0.0, (10, 8), 1.0, [1.0])
    assert two_chunks.tokens_between(0.0, 1.5) == 4
    assert two_chunks.tokens_between(0.0, 2.5) == 8


def test_a_reply_of_one_token_has_no_time_between_tokens():
    found = steady([reply(0.0, tokens=1)], 0.0, 1.0)
    assert found.tpot_ms is None
    assert found.ttft_p99_ms == pytest.approx(500)


def test_requests_that_pile_up_say_that_the_rate_is_not_served():
    # Ten come in each second, and each takes a second longer than the one before.
    late = [reply(n / 10, ttft_s=0.5 + n / 5) for n in range(300)]
    assert steady(late, 10.0, 30.0).saturated
    served = [reply(n / 10) for n in range(300)]
    assert not steady(served, 10.0, 29.0).saturated


def test_a_chance_crowd_is_no_backlog():
    assert not is_too_many(piled_up=8, before=9, arrived=100)
    assert is_too_many(piled_up=16, before=9, arrived=100)


def test_a_window_that_does_not_end_after_it_begins_is_refused():
    with pytest.raises(ValueError, match="expected one that ends after it begins"):
        steady([reply(0.0)], 2.0, 2.0)


def test_percentiles_are_by_nearest_rank():
    assert nearest_rank([], 99) is None
    assert nearest_rank([3.0, 1.0, 2.0], 50) == 2.0
    assert nearest_rank([float(n) for n in range(1, 101)], 99) == 99.0


REPLIES = st.lists(
    st.builds(
        reply,
        st.floats(0, 20),
        st.floats(0.001, 5),
        st.integers(1, 20),
        st.floats(0.001, 0.5),
    ),
    min_size=1,
    max_size=20,
)


@given(REPLIES, st.floats(1, 10), st.floats(11, 19))
def test_the_tokens_of_parts_of_a_window_add_up_to_those_of_the_whole(replies, cut, end):
    whole, first, second = (
        steady(replies, low, high) for low, high in ((0.0, end), (0.0, cut), (cut, end))
    )
    for name in ("output_tokens_per_s", "input_tokens_per_s", "arrivals_per_s", "concurrency"):
        parts = getattr(first, name) * cut + getattr(second, name) * (end - cut)
        assert getattr(whole, name) * end == pytest.approx(parts, abs=1e-6)
    assert whole.ended == first.ended + second.ended
    assert whole.piled_up == first.piled_up + second.piled_up
