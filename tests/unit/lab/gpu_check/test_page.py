"""The page of a check: what it says first, that it shows what was measured, and nothing else."""

import json
import re

import pytest

from tests.unit.lab.gpu_check.results import pairs, results
from vllm_cost_meter.lab.gpu_check.findings import FAILED, LEFT_OUT, unmeasured, wrong_in
from vllm_cost_meter.lab.gpu_check.page import (
    JSON_FILE,
    MARKDOWN_FILE,
    TEXT_FILE,
    as_markdown,
    as_text,
    write_results,
)
from vllm_cost_meter.lab.gpu_check.sections import NO_GPU, sections_of
from vllm_cost_meter.lab.gpu_check.throughput import ratios_of


def words(page: str) -> list[str]:
    """Return the words and figures of a page, without the marks of either form."""
    return re.findall(r"[^\s|#=\\]+", re.sub(r"[-=:]{3,}", "", page))


def table_row(page: str, begins: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| {begins}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_text_and_markdown_have_the_same_words_and_figures():
    sections = sections_of(results())
    assert words(as_text(sections)) == words(as_markdown(sections))


def test_the_first_lines_say_on_what_it_was_measured_and_that_nothing_is_wrong():
    lines = as_text(sections_of(results())).splitlines()
    assert lines[0] == ("GPU check of vllm_cost_meter 0.1.0 on NVIDIA H100 80GB HBM3, 2026-11-30")
    assert lines[2] == "Nothing was found wrong in what was measured."


def test_a_check_on_the_cpu_says_in_its_first_line_that_it_says_nothing_of_a_gpu():
    found = results()
    found["is_gpu"], found["machine"]["gpu"] = False, None
    first, _, second, *rest = as_text(sections_of(found)).splitlines()
    assert "on CPU, Xeon" in first
    assert second == NO_GPU
    assert not any("GPU-1" in line for line in rest)


def test_what_was_not_measured_stands_at_the_top_with_its_reason_and_has_no_section():
    found = results()
    why = "30 s were left of 400, 200 needed"
    found["parts"]["throughput"] = {"state": LEFT_OUT, "why": why}
    found["parts"]["energy"] = {"state": FAILED, "why": "it broke\na second line"}
    assert unmeasured(found)[1] == f"throughput (left out): {why}"
    page = as_text(sections_of(found))
    assert page.splitlines()[2:6] == [
        "Not measured:",
        "- energy (failed): it broke",
        f"- throughput (left out): {why}",
        "WRONG:",
    ]
    assert "What does the meter cost?" not in page
    assert "a second line" not in page


def test_a_game_without_a_verdict_and_windows_without_energy_are_not_measured():
    found = results()
    game = found["parts"]["game"]["figures"]
    game["verdict"], game["why"] = "refused", "too noisy"
    (window,) = found["parts"]["energy"]["figures"]["windows"]
    window["energy"] |= {"counter_mj": None, "meter_mj": None, "why_not": "no_counter: none"}
    window["meter_by_counter"] = window["integral_by_counter"] = None
    assert unmeasured(found) == [
        "game (no verdict): too noisy",
        "joules in energy: no_counter: none",
    ]
    assert wrong_in(found) == []
    row = table_row(as_markdown(sections_of(found)), "8 |")
    # Clients, seconds, requests, tokens/s, then joules and ratios.
    assert row == ["8", "8.0", "40", "1000", "-", "800.0 ± 0.0", "-", "-", "-"]


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (
            lambda parts: parts["game"]["figures"].update(verdict="differs", why="they differ"),
            "they differ",
        ),
        (
            lambda parts: parts["books"]["figures"]["replies"].update(different=[{}]),
            "1 of 12 replies said another cost than the ledger",
        ),
        (
            lambda parts: parts["books"]["figures"]["doctor"]["findings"].append(
                {"name": "energy", "ok": False, "state": "fail", "detail": "broken"}
            ),
            "doctor: energy: broken",
        ),
        (
            lambda parts: parts["throughput"]["figures"].update(
                audit={"balanced": False, "reason": "lost bills"}
            ),
            "throughput: the books of that server do not balance: lost bills",
        ),
        (
            lambda parts: parts["books"]["figures"].update(
                audit={"balanced": None, "reason": "the engine lives", "runs": []}
            ),
            "books: the books of that server are not known to balance: the engine lives",
        ),
        (
            lambda parts: parts["energy"]["figures"]["windows"][0]["traffic"].update(
                failures=["500", "500"]
            ),
            "2 requests of mixed traffic failed",
        ),
    ],
)
def test_what_is_wrong_is_said_at_the_top(spoil, told):
    found = results()
    assert wrong_in(found) == []
    spoil(found["parts"])
    assert wrong_in(found) == [told]
    lines = as_text(sections_of(found)).splitlines()
    assert lines[2:4] == ["WRONG:", f"- {told}"]


def test_the_sections_show_the_figures_of_the_results():
    found = results()
    page = as_markdown(sections_of(found))
    parts = {name: part["figures"] for name, part in found["parts"].items()}
    tiny = parts["game"]["players"]["tiny"]
    assert table_row(page, "tiny")[2] == (
        f"{tiny['measured_ns'] / 1e6:.3f} ± {tiny['noise_ns'] / 1e6:.3f}"
    )
    added = parts["overlap"]["less_ns"] / 1e6
    assert table_row(page, "the chunk adds less")[1].startswith(f"{added:.3f} ± ")
    assert table_row(page, "audit")[1] == "balanced; differences: none"
    assert table_row(page, "charges of prefill")[1] == "known to 2.10 %"
    assert table_row(page, "charges of decode")[1] == "not known yet"
    ratio = parts["throughput"]["ratios"]["output_tokens_per_s"]
    assert table_row(page, "output_tokens_per_s")[1:] == [
        "990",
        "1000",
        f"{ratio['ratio']:.4f} ({ratio['low']:.4f} to {ratio['high']:.4f})",
    ]
    assert "# alone, up after 61 s" in page


def test_a_game_that_was_too_noisy_says_what_to_do_in_a_check():
    found = results()
    found["parts"]["game"]["figures"] |= {
        **{"verdict": "refused", "why": "take --rounds 99", "noise_share": 0.2},
        **{"noise_share_max": 0.1, "rounds": 6},
    }
    page = as_text(sections_of(found))
    assert "the noise was 20.0% of GPU time in 6 rounds, and at most 10% allows one" in page
    assert "--rounds" not in page


def test_ratios_of_too_few_pairs_are_not_shown():
    found = results()
    found["parts"]["throughput"]["figures"] |= ratios_of(pairs(990, 1000), 4)
    assert table_row(as_markdown(sections_of(found)), "output_tokens_per_s")[3] == "-"
    assert unmeasured(found) == ["ratios in throughput: 2 pairs are too few, or a figure was 0"]


def test_the_three_files_are_written_whole(tmp_path):
    found = results()
    write_results(found, tmp_path)
    write_results(found | {"seconds": 800.0}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [JSON_FILE, MARKDOWN_FILE, TEXT_FILE]
    )
    assert json.loads((tmp_path / JSON_FILE).read_text())["seconds"] == 800.0
    assert "800 s of 1200" in (tmp_path / TEXT_FILE).read_text()


def test_a_difference_that_is_not_known_is_not_none():
    found = results()
    (run,) = found["parts"]["books"]["figures"]["audit"]["runs"]
    run |= {"difference_ns": 5, "energy_difference_mj": None}
    assert table_row(as_markdown(sections_of(found)), "audit")[1] == (
        "balanced; differences: {'difference_ns': 5}; not compared: energy_difference_mj"
    )


def test_books_that_are_not_known_to_balance_are_not_said_to_be_wrong():
    found = results()
    found["parts"]["throughput"]["figures"]["audit"] = {"balanced": None, "reason": "r", "runs": []}
    page = as_text(sections_of(found))
    assert "its books may balance or not: that is unknown." in page
    assert "DO NOT balance" not in page


def test_a_ratio_of_energies_has_what_it_may_be_off():
    page = as_markdown(sections_of(results()))
    # 100 W for 8 s; at each end a jump of 100 ms, i.e. 2 x 10 J of 800 J. Power is constant.
    *_, integrated, meter = table_row(page, "8 |")
    assert (integrated, meter) == ("1.0000 ± 0.0250", "1.0000 ± 0.0250")


def test_an_interval_of_few_steps_is_not_said_to_be_of_95_percent():
    found = results()
    few = "Of fewer than 6 steps the interval is their range, and less than 95 %."
    assert few not in as_text(sections_of(found))
    found["parts"]["overlap"]["figures"]["steps"]["long"]["with"]["values"] = 5
    assert few in as_text(sections_of(found))


def test_settings_are_shown_as_a_shell_takes_them():
    found = results()
    found["machine"]["environment"] = {"VLLM_CACHE_ROOT": "/my models/a;b"}
    assert "VLLM_CACHE_ROOT='/my models/a;b' \\\n" in as_text(sections_of(found))


def test_a_difference_that_rounds_to_nothing_has_no_sign():
    found = results()
    found["parts"]["overlap"]["figures"]["less_ns"] = -0.4
    assert table_row(as_markdown(sections_of(found)), "the chunk adds less")[1].startswith("0.000 ")
