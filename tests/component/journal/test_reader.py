"""What is read from a journal: whole, torn at its end, damaged in its middle, or cut in two."""

import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.component.ledger.test_reader import http
from tests.support.builders import COST_MODEL, make_snapshot
from vllm_cost_meter.errors import LedgerError
from vllm_cost_meter.journal import segments
from vllm_cost_meter.journal.entries import read_entry, write_entry
from vllm_cost_meter.journal.frames import frame, scan
from vllm_cost_meter.journal.open_journal import OpenJournal
from vllm_cost_meter.journal.reader import START, Gap, JournalReader, Position
from vllm_cost_meter.journal.segments import segment_indexes, segment_name
from vllm_cost_meter.records.snapshot import Snapshot


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "ledger.db.journal"


def payload(number: int) -> bytes:
    return write_entry(http(f"h{number}", route="r" * (number % 50)))


def write(journal: OpenJournal, first: int, last: int, group: int = 3) -> None:
    number = first
    while number <= last:
        frames = [frame(n, payload(n)) for n in range(number, min(number + group, last + 1))]
        number += journal.append(number, frames)


def made(folder: Path, records: int, segment_bytes: int = 1 << 12) -> Path:
    """A journal of a process that is dead, with these records."""
    journal = OpenJournal(folder, segment_bytes=segment_bytes)
    write(journal, 1, records)
    journal.close()
    return journal.place


def everything(place: Path, position: Position = START, *, is_alive: bool = False):
    """All payloads from a position on, and all gaps."""
    reader = JournalReader(place, position)
    payloads, gaps = [], []
    while True:
        before = reader.position
        read = reader.read(is_alive=is_alive)
        payloads += [write_entry(record) for _, record in read.records]
        gaps += read.gaps
        assert read.position == reader.position
        if reader.position == before:
            return payloads, gaps


def test_a_snapshot_of_an_earlier_version_is_read_with_what_it_says_of_its_models():
    """Its models have three planes, an error of one of them, and no curve."""
    plain = msgspec.msgpack.decode(write_entry(make_snapshot(cost_models=(COST_MODEL,)))[1:])
    model = plain["cost_models"][0]
    for later in ("curve", "charge_errors", "error_other_form"):
        del model[later]
    model |= {"form": "one plane", "planes": [[1.0] * 5] * 3, "error_one_plane": 0.04}
    read = read_entry(bytes([4]) + msgspec.msgpack.encode(plain))
    assert isinstance(read, Snapshot)
    (known,) = read.cost_models
    assert (known.version, known.form, len(known.planes), known.steps) == (3, "one plane", 3, 128)
    assert known.curve is known.charge_errors is None


def test_a_curve_of_a_version_before_features_is_read_as_one_without_them():
    plain = msgspec.msgpack.decode(write_entry(make_snapshot(cost_models=(COST_MODEL,)))[1:])
    curve = plain["cost_models"][0]["curve"]
    assert curve.pop("form") == "curve with features"
    curve["coefficients"] = [1.0] * 33
    read = read_entry(bytes([4]) + msgspec.msgpack.encode(plain))
    assert isinstance(read, Snapshot)
    (known,) = read.cost_models
    assert known.curve.form == "curve"
    assert known.curve.coefficients == (1.0,) * 33


def test_all_is_read_in_order_over_several_segments(folder):
    place = made(folder, 300)
    assert len(segment_indexes(place)) > 3
    assert everything(place) == ([payload(n) for n in range(1, 301)], [])


def test_reading_goes_on_where_it_stopped_while_the_process_appends(folder):
    journal = OpenJournal(folder, segment_bytes=1 << 12)
    reader = JournalReader(journal.place)
    seen: list[bytes] = []
    for first in range(1, 200, 7):
        write(journal, first, first + 6)
        reader = JournalReader(journal.place, reader.position)  # as after a restart
        seen += [write_entry(record) for _, record in reader.read(is_alive=True).records]
    assert seen == [payload(n) for n in range(1, len(seen) + 1)]
    assert len(seen) == 203
    assert reader.read(is_alive=True).records == ()


def test_a_record_larger_than_a_segment_and_than_a_chunk_is_whole(folder):
    journal = OpenJournal(folder, segment_bytes=1 << 12)
    small, next_, large = payload(1), payload(3), write_entry(http("h2", route="r" * (3 << 20)))
    journal.append(1, [frame(1, small)])
    assert journal.append(2, [frame(2, large), frame(3, next_)]) == 1
    journal.append(3, [frame(3, next_)])
    assert everything(journal.place, is_alive=True) == ([small, large, next_], [])


def test_segments_that_were_read_may_be_removed(folder):
    place = made(folder, 300)
    reader = JournalReader(place)
    reader.read(is_alive=False)
    for index in segment_indexes(place)[:-1]:
        (place / segment_name(index)).unlink()
    assert everything(place, reader.position) == ([], [])


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 4_000), records=st.integers(1, 60))
def test_what_was_being_written_when_the_process_died_is_no_damage(cut, records, tmp_path_factory):
    """Whatever the length to which the last segment came, all whole frames are read."""
    place = made(tmp_path_factory.mktemp("cut"), records, 1 << 16)
    (file,) = place.glob("*.segment")
    whole = file.read_bytes()
    with file.open("r+b") as opened:
        opened.seek(min(cut, len(whole)))
        opened.write(bytes(len(whole) - min(cut, len(whole))))
    expected = [found.payload for found in scan(whole, segments.HEAD_BYTES) if found.end <= cut]
    assert everything(place) == (expected, [])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_whatever_bytes_are_damaged_every_whole_frame_is_read_and_the_gap_is_named(
    data, tmp_path_factory
):
    records = 120
    place = made(tmp_path_factory.mktemp("damaged"), records, 1 << 12)
    files = sorted(place.glob("*.segment"))
    file = data.draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    begin = data.draw(st.integers(0, 3_900))
    length = data.draw(st.integers(1, 400))
    noise = random.Random(begin * 1000 + length).randbytes(length)
    content[begin : begin + length] = noise
    file.write_bytes(content)
    payloads, gaps = everything(place)
    # The judge: a frame is there or not by its text alone.
    joined = b"".join(each.read_bytes() for each in files)
    whole = [n for n in range(1, records + 1) if frame(n, payload(n)) in joined]
    assert payloads == [payload(n) for n in whole]
    named = {n for gap in gaps for n in range(gap.after + 1, gap.after + gap.frames + 1)}
    missing = set(range(1, (whole or [0])[-1] + 1)) - set(whole)
    assert named >= missing
    assert not named & set(whole)


def test_a_missing_segment_is_a_gap(folder):
    place = made(folder, 300)
    index = segment_indexes(place)[1]
    lost = [f.number for f in scan((place / segment_name(index)).read_bytes(), segments.HEAD_BYTES)]
    (place / segment_name(index)).unlink()
    payloads, gaps = everything(place)
    assert gaps == [Gap(lost[0] - 1, len(lost), "a segment is missing, or ends too early")]
    assert payloads == [payload(n) for n in range(1, 301) if n not in lost]


def test_damage_behind_the_end_is_not_told_while_the_process_may_be_writing(folder):
    journal = OpenJournal(folder, segment_bytes=1 << 16)
    write(journal, 1, 10, group=1)
    (file,) = journal.place.glob("*.segment")
    content = bytearray(file.read_bytes())
    ends = [found.end for found in scan(bytes(content), segments.HEAD_BYTES)]
    content[ends[6] : ends[7]] = bytes(ends[7] - ends[6])  # its 8th frame comes a moment later
    file.write_bytes(content)
    alive, gaps = everything(journal.place, is_alive=True)
    assert (len(alive), gaps) == (7, [])
    journal.close()
    payloads, gaps = everything(journal.place)
    assert (len(payloads), gaps) == (9, [Gap(7, 1, "frames are damaged")])


def test_a_segment_of_a_newer_format_is_refused_and_stays(folder):
    place = made(folder, 3)
    (file,) = place.glob("*.segment")
    content = bytearray(file.read_bytes())
    newer = segments._HEAD.pack(segments.MAGIC, segments.FORMAT_VERSION + 1, 1, 0)[:-4]
    content[: segments.HEAD_BYTES] = newer + segments.zlib.crc32(newer).to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(LedgerError, match=r"has format 2, this cost meter knows 1; upgrade"):
        everything(place)


def test_a_record_of_a_newer_version_stops_the_reader_before_it_and_loses_nothing(folder):
    journal = OpenJournal(folder)
    journal.append(1, [frame(1, payload(1)), frame(2, b"\x63new"), frame(3, payload(3))])
    reader = JournalReader(journal.place)
    assert [number for number, _ in reader.read(is_alive=False).records] == [1]
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"record 2 is whole .* upgrade this one"):
            reader.read(is_alive=False)
        assert reader.position.number == 1


def test_whoever_never_read_a_journal_begins_with_what_is_still_there(folder):
    place = made(folder, 300)
    first = segment_indexes(place)[0]
    (place / segment_name(first)).unlink()
    payloads, gaps = everything(place)
    assert not gaps
    assert payloads == [payload(n) for n in range(301 - len(payloads), 301)]


def segment(place: Path, index: int, first_number: int, *frames: bytes) -> None:
    """Write a segment as a crash may have left it."""
    place.mkdir(exist_ok=True)
    content = segments.head(first_number) + b"".join(frames)
    (place / segment_name(index)).write_bytes(content.ljust(4096, b"\0"))


def spoilt(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 255])


def frames(first: int, last: int) -> list[bytes]:
    return [frame(number, payload(number)) for number in range(first, last + 1)]


def test_what_a_failed_sync_had_written_anew_is_read_there_whatever_is_left_of_it_before(tmp_path):
    one, two, three, four, five = frames(1, 5)
    segment(tmp_path / "j", 1, 1, one, two, spoilt(three), four)
    segment(tmp_path / "j", 2, 3, three, four, five)
    assert everything(tmp_path / "j") == ([payload(n) for n in range(1, 6)], [])


def test_damage_before_what_was_written_anew_is_a_gap_of_what_is_gone_only(tmp_path):
    one, two, three, four, five = frames(1, 5)
    segment(tmp_path / "j", 1, 1, one, spoilt(two), spoilt(three), four)
    segment(tmp_path / "j", 2, 3, three, four, five)
    payloads, gaps = everything(tmp_path / "j")
    assert payloads == [payload(n) for n in (1, 3, 4, 5)]
    assert [(gap.after, gap.frames) for gap in gaps] == [(1, 1)]


def test_frames_behind_a_head_that_a_crash_took_are_read(tmp_path):
    segment(tmp_path / "j", 1, 1, *frames(1, 3))
    file = tmp_path / "j" / segment_name(1)
    file.write_bytes(bytes(segments.HEAD_BYTES) + file.read_bytes()[segments.HEAD_BYTES :])
    assert everything(tmp_path / "j") == ([payload(n) for n in range(1, 4)], [])


def test_a_first_segment_of_which_nothing_is_left_is_a_gap(tmp_path):
    segment(tmp_path / "j", 1, 1, spoilt(frames(1, 1)[0]))
    segment(tmp_path / "j", 2, 2, *frames(2, 3))
    payloads, gaps = everything(tmp_path / "j")
    assert payloads == [payload(2), payload(3)]
    assert [(gap.after, gap.frames) for gap in gaps] == [(0, 1)]
