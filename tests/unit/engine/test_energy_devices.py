"""energy.py: which cards are the engine's own, and what is known of them.

Goal: an engine never reads another's card, and says so where it cannot tell which is its own.
Method: the real binding (pynvml) on a library that the tests compile, see `nvml.py`.
"""

import pytest

from tests.support.nvml import GPU_IS_LOST, A, B, Card, code, reader
from vllm_cost_meter.engine.energy.nvml import DeviceInfo, EnergyReading, visible_device_ids


@pytest.mark.parametrize(
    ("visible", "ordinals", "expected"),
    [
        (None, [0, 1], ["0", "1"]),
        (None, [2, 3], ["2", "3"]),
        ("4,5,6,7", [2, 3], ["6", "7"]),
        ("2,1", [0], ["2"]),
        (" 2 , 01", [1, 0], ["1", "2"]),
        ("0,2,-1,1", [0, 1], ["0", "2"]),
        ("0,none,1", [0], ["0"]),
        (f"{A},{B}", [1], [B]),
        ("MIG-1,MIG-2", [1], ["MIG-2"]),
    ],
)
def test_visible_devices_are_read_as_cuda_does(visible, ordinals, expected):
    assert visible_device_ids(visible, ordinals) == expected


def test_the_cards_of_an_engine_are_summed_and_others_are_not(machine):
    machine.add(*(Card(f"GPU-{n}") for n in range(4)))
    clock = reader([0, 1], visible="3,1,0")
    clock.read()
    machine.use(1_000, 200, 30, 4)
    assert clock.read() == EnergyReading(204, None)


def test_two_engines_of_one_host_read_their_own_cards(machine):
    machine.add(*(Card(f"GPU-{n}") for n in range(4)))
    engines = [reader([0, 1]), reader([2, 3])]
    for engine in engines:
        engine.read()
    machine.use(1, 10, 100, 1_000)
    assert [engine.read().energy_mj for engine in engines] == [11, 1_100]


@pytest.mark.parametrize("visible", [B, B[:8], f"{B},{A}", f" {B[:10]} , {A}"])
def test_a_card_is_found_by_its_uuid_or_the_first_digits_of_it(machine, visible):
    machine.add(Card(A), Card(B))
    clock = reader([0], visible=visible)
    clock.read()
    machine.use(1, 20)
    assert clock.read().energy_mj == 20
    assert [device.uuid for device in clock.counter.devices] == [B]


def test_a_card_of_others_that_is_lost_does_not_matter(machine):
    machine.add(Card(A, handle_result=GPU_IS_LOST), Card(B))
    for visible in (B, B[:8], "1"):
        assert code(reader([0], visible=visible, order="").read()) == "first"


def test_first_digits_that_fit_two_cards_find_none(machine):
    machine.add(Card("GPU-aa1"), Card("GPU-aa2"))
    assert code(reader([0], visible="GPU-aa").read()) == "error"


def test_the_cards_have_names_uuids_and_a_power_that_they_cannot_exceed(machine):
    machine.add(Card(A), Card(B, name="NVIDIA L4", max_mw=72_000))
    counter = reader([0, 1]).counter
    assert counter.devices == (DeviceInfo(None, None), DeviceInfo(None, None))
    assert counter.power_max_mw is None
    counter.read(0)
    assert counter.devices == (DeviceInfo("NVIDIA H100 80GB HBM3", A), DeviceInfo("NVIDIA L4", B))
    assert counter.power_max_mw == 772_000


def test_a_power_limit_that_one_card_does_not_tell_is_unknown_and_the_energy_is_not(machine):
    machine.add(Card(A), Card(B, max_mw=0))
    clock = reader([0, 1])
    clock.read()
    machine.use(1, 2)
    assert clock.read().energy_mj == 3
    assert clock.counter.power_max_mw is None


def test_a_card_that_knows_no_mig_is_read_as_any_other(machine):
    machine.add(Card(A, mig_mode=-1))
    clock = reader([0])
    clock.read()
    machine.use(7)
    assert clock.read().energy_mj == 7


@pytest.mark.parametrize("name", ["MIG-1234", f"MIG-{A}/1/0"])
def test_a_mig_slice_is_unknown_as_the_card_counts_all_its_slices(machine, name):
    machine.add(
        Card(A, mig_mode=1),
        Card("MIG-1234", kind="mig", name="NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
    )
    clock = reader([0], visible=name)
    assert [code(clock.read()) for _ in range(2)] == ["mig"] * 2
    assert [device.uuid for device in clock.counter.devices] == [name]


def test_a_card_in_mig_mode_is_unknown_however_it_is_named(machine):
    machine.add(Card(A, mig_mode=1))
    for visible in (None, "0", A):
        clock = reader([0], visible=visible)
        assert code(clock.read()) == "mig"
        assert clock.counter.devices[0].uuid == A


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "0", "1,-1,0", "0,0", "1,1,0"])
def test_a_gpu_that_is_not_visible_is_unknown(machine, visible):
    machine.add(Card(A), Card(B))
    clock = reader([0, 1], visible=visible)
    assert code(clock.read()) == "no_device"
    assert clock.counter.devices == ()


@pytest.mark.parametrize("ordinals", [[], [-1], None, ["0"]])
def test_ordinals_that_are_none_are_no_devices(machine, ordinals):
    assert code(reader(ordinals).read()) == "no_device"


@pytest.mark.parametrize("visible", ["2", str(2**32)])
def test_a_gpu_that_the_machine_does_not_have_is_unknown(machine, visible):
    machine.add(Card(A), Card(B))
    assert code(reader([0], visible=visible).read()) == "error"


def test_an_index_among_different_cards_is_unknown_unless_the_order_is_said(machine):
    machine.add(Card(A), Card(B, name="NVIDIA L4"))
    assert code(reader([0], order="FASTEST_FIRST").read()) == "order"
    # By name, by order, or as all of them, it is clear which are meant.
    assert code(reader([0], visible=A, order="FASTEST_FIRST").read()) == "first"
    assert code(reader([0], order="PCI_BUS_ID").read()) == "first"
    assert code(reader([0, 1], order="FASTEST_FIRST").read()) == "first"


def test_an_index_among_equal_cards_is_clear(machine):
    machine.add(Card(A), Card(B))
    assert code(reader([1], order="FASTEST_FIRST").read()) == "first"
