"""The page on checking a GPU says what is run, how much of it, and what is written."""

from tests.support.pages import DOCS, names, section, table_rows
from vllm_cost_meter.lab.gpu_check import page
from vllm_cost_meter.lab.gpu_check.books import REPLIES
from vllm_cost_meter.lab.gpu_check.check import LOGS
from vllm_cost_meter.lab.gpu_check.model import GIB, LARGE_FROM_BYTES
from vllm_cost_meter.lab.gpu_check.overlap import READ_TIMES_MIN
from vllm_cost_meter.lab.gpu_check.plan import ON_GPU, PARTS, CheckPlan, OverlapSize
from vllm_cost_meter.lab.validation.real_server.verdict import NOISE_SHARE_MAX, TOLERANCE_SHARE

PAGE = DOCS / "howto" / "gpu-check.md"
TEXT = " ".join(PAGE.read_text().split())


def test_the_parts_are_listed_in_the_order_in_which_they_run():
    assert names(PAGE, "What it measures") == list(PARTS)


def test_the_files_are_those_that_are_written():
    told = " ".join(row[0] for row in table_rows(section(PAGE, "What it writes")))
    for name in (page.MARKDOWN_FILE, page.TEXT_FILE, page.JSON_FILE, LOGS):
        assert f"`{name}`" in told


def test_figures_in_the_text_are_those_of_the_code():
    overlap: OverlapSize = ON_GPU.overlap
    (short, short_tokens), (long, long_tokens) = overlap.short, overlap.long
    *clients, most = ON_GPU.energy.clients
    budget_s = CheckPlan(PAGE).budget_s
    assert (ON_GPU.game.players, ON_GPU.game.budget_part) == (5, 0.4)
    for words in (
        f"{budget_s / 60:.0f} minutes at most (`--budget-s {budget_s:.0f}`)",
        f"less than {LARGE_FROM_BYTES // GIB} GiB",
        f"{', '.join(map(str, clients))} and {most} clients",
        f"{short} decodes at {short_tokens} tokens of context and {long} at {long_tokens:,}",
        f"a prefill of {overlap.chunk:,} tokens",
        f"Contexts of {long_tokens:,} tokens",
        f"Below {READ_TIMES_MIN * short * short_tokens // long:,} the part `overlap` fails",
        f"whether {REPLIES} replies",
        f"its noise and {TOLERANCE_SHARE * 100:.0f} % of GPU time",
        f"the noise was above {NOISE_SHARE_MAX * 100:.0f} %",
    ):
        assert words in TEXT, words
