"""What the canary understands of a callable or a record, and how it names what it does not."""

import dataclasses
import re

import msgspec
import pytest

from vllm_cost_meter.errors import VllmMismatchError
from vllm_cost_meter.vllm_hooks import scheduler
from vllm_cost_meter.vllm_hooks.canary import WHAT_TO_DO, check_callables, check_fields, find

KNOWN = {"step": ("self", "request")}


class AsKnown:
    def step(self, request: object) -> None: ...


class WithMoreThatIsOptional:
    def step(self, request, newer=None, *more, late=0, **rest): ...


class Derived(AsKnown):
    pass


class Gone:
    pass


class Renamed:
    def step(self, job): ...


class Fewer:
    def step(self): ...


class Swapped:
    def step(self, budget, request): ...


class NeedsMore:
    def step(self, request, budget): ...


class NeedsMoreByName:
    def step(self, request, *, budget): ...


class Static:
    @staticmethod
    def step(request): ...


class Property:
    @property
    def step(self): ...


class Compiled:
    step = type("builtin", (), {"__call__": None, "__signature__": "none of its own"})()


class Async:
    async def step(self, request): ...


@pytest.mark.parametrize("owner", [AsKnown, WithMoreThatIsOptional, Derived])
def test_what_begins_as_known_and_needs_no_more_is_understood(owner):
    check_callables(owner, KNOWN, "vllm.Owner")


@pytest.mark.parametrize(
    ("owner", "found"),
    [
        (Gone, "found no such name"),
        (Renamed, "found (self, job)"),
        (Fewer, "found (self)"),
        (Swapped, "found (self, budget, request)"),
        (NeedsMore, "found (self, request, budget)"),
        (NeedsMoreByName, "found (self, request, *, budget)"),
        (Static, "found (request)"),
        (Property, "found a property"),
        (Compiled, "found one without a signature"),
        (Async, "found it async"),
    ],
)
def test_all_else_is_refused_with_what_was_expected_and_found(owner, found):
    says = re.escape(f"expected vllm.Owner.step(self, request), {found}")
    with pytest.raises(VllmMismatchError, match=f"^{says}$"):
        check_callables(owner, KNOWN, "vllm.Owner")


def test_types_are_not_shown_as_they_differ_between_versions():
    class Typed:
        def step(self, request: int, budget: dict[str, int]) -> None: ...

    with pytest.raises(VllmMismatchError, match=r"found \(self, request, budget\)$"):
        check_callables(Typed, KNOWN, "vllm.Owner")


RECORDS = [
    dataclasses.make_dataclass("Record", ["tokens", "request_id"]),
    msgspec.defstruct("Record", ["tokens", "request_id"]),
]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_may_have_more_fields_but_no_fewer(record):
    check_fields(record, ("request_id",), "vllm.Record")
    says = "expected vllm.Record with the fields steps, found tokens, request_id"
    with pytest.raises(VllmMismatchError, match=f"^{says}$"):
        check_fields(record, ("request_id", "steps"), "vllm.Record")


def test_a_module_or_a_name_that_is_gone_is_named():
    with pytest.raises(VllmMismatchError, match=r"^expected the module vllm\.gone, found Module"):
        find("vllm.gone", "Scheduler")
    with pytest.raises(VllmMismatchError, match=r"^expected vllm\.plugins\.Gone, found no such"):
        find("vllm.plugins", "Gone")


class Scheduler:
    """As the operator's own may be (`--scheduler-cls`)."""

    def schedule(self): ...
    def update_from_output(self, scheduler_output, model_runner_output): ...
    def _free_request(self, request): ...
    def add_request(self, request): ...
    def get_request_counts(self): ...


class OtherScheduler(Scheduler):
    def _free_request(self, request, reason): ...


def test_a_scheduler_class_that_is_understood_is_subclassed_once():
    metered = scheduler.meter_scheduler_class(Scheduler)
    assert metered.__bases__ == (scheduler.MeteredScheduler, Scheduler)
    assert scheduler.meter_scheduler_class(metered) is metered


def test_a_scheduler_class_that_is_not_stays_as_it_is_with_one_line(caplog):
    assert scheduler.meter_scheduler_class(OtherScheduler) is OtherScheduler
    [record] = caplog.records
    where = f"{__name__}.OtherScheduler._free_request(self, request)"
    assert record.getMessage() == (
        "cost meter: the engine runs unmetered: "
        f"expected {where}, found (self, request, reason). {WHAT_TO_DO}"
    )


def test_what_is_no_class_is_handed_on(caplog):
    nothing = object()
    assert scheduler.meter_scheduler_class(nothing) is nothing
    assert len(caplog.records) == 1
