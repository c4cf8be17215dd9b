"""Goal: the native attribution allocates nothing per step, and leaks nothing."""

import sys
import tracemalloc

from tests.unit.attribution.test_attribution import copy_of
from vllm_cost_meter.attribution import _native

NOW = 0


class TestNativeMemory:
    def run_steps(self, meter, ids, count):
        in_flight = meter.begin(dict.fromkeys(ids, 1), NOW)
        for _ in range(count):
            step = meter.begin(dict.fromkeys(ids, 1), NOW)
            meter.settle(in_flight, 10**6)
            meter.drained()
            in_flight = step
        meter.settle(in_flight, 10**6)

    def test_steady_step_allocates_nothing_per_request(self):
        meter = _native.StepMeter("tokens")
        scheduled = dict.fromkeys([f"r{n}" for n in range(2000)], 1)
        meter_steps, version = 0, -1
        # A published model is kept, so begin right after one that leaves time until the next.
        while meter_steps < 300 or meter.model_version == version:
            version = meter.model_version
            meter.settle(meter.begin(scheduled, NOW), 10**6)
            meter_steps += 1
        version = meter.model_version
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            for _ in range(100):
                meter.settle(meter.begin(scheduled, NOW), 10**6)
                meter.drained()
            after, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert meter.model_version == version
        # A few ints and an empty list at a time: less than one byte per request.
        assert peak - before < 1000
        assert after - before < 500

    def test_memory_is_given_back_with_the_meter_and_reused_by_later_requests(self):
        def live(generations):
            meter = _native.StepMeter("tokens")
            for generation in range(generations):
                ids = [f"{generation}-{n}" for n in range(500)]
                self.run_steps(meter, ids, 3)
                meter.begin(dict.fromkeys(ids, 1), NOW)  # closed with a step in flight
                for request_id in ids:
                    meter.close(request_id, NOW)
            meter.abandon()
            current, _ = tracemalloc.get_traced_memory()
            return meter, current

        tracemalloc.start()
        try:
            empty, _ = tracemalloc.get_traced_memory()
            few, many = live(3)[1] - empty, live(30)[1] - empty
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert many < few + 20_000  # 27 generations more
        assert left - empty < 20_000 < few

    def test_ids_are_released_with_their_request(self):
        meter = _native.StepMeter("tokens")
        request_id = copy_of("an id of its own")
        same = copy_of("an id of its own")
        before = sys.getrefcount(request_id), sys.getrefcount(same)
        meter.open(request_id, 1)
        step = meter.begin({same: 1}, NOW)
        meter.begin({request_id: 1}, NOW)
        meter.close(same, NOW)
        meter.settle(step, 1)
        assert (sys.getrefcount(request_id), sys.getrefcount(same)) == before
