"""What README.md and the other pages tell people to do can be done: commands, links, names."""

import importlib
import math
import re
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.pages import DOCS, PAGES, ROOT, section, table_rows
from vllm_cost_meter.api_server import reply_bytes as reply
from vllm_cost_meter.api_server.refusal import refusal, warning
from vllm_cost_meter.api_server.reply_plan import COMMENT_HEADER
from vllm_cost_meter.cli.commands import whole
from vllm_cost_meter.config.loading import OTHER_NAMES
from vllm_cost_meter.config.settings import PREFIX, Settings
from vllm_cost_meter.lab.validation.scenarios import SCENARIOS
from vllm_cost_meter.records.bill import BILL_KEY
from vllm_cost_meter.records.owner import Owner
from vllm_cost_meter.tenants.budgets import Budget, Standing, Verdict
from vllm_cost_meter.tenants.rules import PROOF_HEADER

README = ROOT / "README.md"
QUICKSTART = DOCS / "quickstart.md"
MAKEFILE = (ROOT / "Makefile").read_text()
COMMANDS = whole().commands
COMMAND = re.compile(r"(?<![/\w:])vllm-cost-meter((?: +[-a-z]+)+)")
FILES = [
    str(path.relative_to(ROOT))
    for folder in ("vllm_cost_meter", "csrc", "scripts", "tests", "benchmarks")
    for path in (ROOT / folder).rglob("*.py*")
] + ["setup.py"]
# Environment names that look like settings: examples of what goes wrong.
WRONG_NAMES = {"COST_METER_PROT", "COST_METER_SERVICE_HOST"}
# Pages of what no user can see yet. Linked from the README, such a page leaves this list.
UNLINKED: set[str] = set()
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code_of(page: Path) -> list[str]:
    """Return the code spans and code lines of a page, without their comments."""
    text = page.read_text()
    lines = [line for line in text.splitlines() if line.startswith("    ")]
    spans = re.findall("`([^`]+)`", "\n".join(x for x in text.splitlines() if x[:4] != "    "))
    return [piece.partition(" # ")[0] for piece in [*lines, *spans]]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def resolve(name: str) -> object:
    """Return the module or the thing in it that a dotted name stands for; None for nothing."""
    module, _, rest = name.rpartition(".")
    try:
        return importlib.import_module(name)
    except ImportError:
        return getattr(resolve(module), rest, None) if module else None


def test_the_pages_are_found():
    assert {README, DOCS / "reference" / "http-api.md", ROOT / "CHANGELOG.md"} <= set(PAGES)


@EACH_PAGE
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if path.startswith("https:"):
            continue
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[^)#]+\.md)[)#]", README.read_text()))
    assert linked == {str(page.relative_to(ROOT)) for page in DOCS.rglob("*.md")} - UNLINKED


def test_the_table_of_vllm_versions_is_of_those_that_make_matrix_runs():
    """Its figures are a run's; that all passed is what the README claims."""
    text = (DOCS / "reference" / "vllm-versions.md").read_text()
    table = re.search(r"<!-- make matrix -->(.*)<!-- /make matrix -->", text, re.DOTALL)[1]
    head, _, *rows = [line.strip("|").split("|") for line in table.split("\n") if line[:1] == "|"]
    assert [cell.strip() for cell in head] == [
        *("vLLM", "torch", "passed", "failed", "skipped", "minutes", "commit"),
    ]
    versions = re.search(r"^MATRIX := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    assert [row[0].strip() for row in rows] == versions
    assert {row[3].strip() for row in rows} == {"0"}
    assert f"[vLLM {versions[0]} to {versions[-1]}]" in " ".join(README.read_text().split())


@EACH_PAGE
def test_make_targets_and_variables_exist(page):
    targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    for piece in code_of(page):
        for target, rest in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)*)\b(.*)", piece):
            assert target in targets, piece
            for variable in re.findall(r"\b([A-Z_]+)=", rest):
                assert variable in MAKEFILE, piece


@EACH_PAGE
def test_commands_and_their_options_exist(page):
    for piece in code_of(page):
        for words in COMMAND.findall(piece):
            name, *rest = words.split()
            if name.startswith("-"):
                assert name in ("--version", "--help"), piece
                continue
            assert name in COMMANDS, piece
            command = COMMANDS[name]
            while rest and (inner := getattr(command, "commands", None)):
                assert rest[0] in inner, piece
                command = inner[rest.pop(0)]
            options = {o for parameter in command.params for o in parameter.opts}
            assert {word for word in rest if word.startswith("--")} <= options, piece


def test_every_command_is_told_on_a_page_that_a_person_wrote():
    pages = [README, *(page for page in DOCS.rglob("*.md") if page.name != "cli.md")]
    told = {
        words.split()[0]
        for page in pages
        for piece in code_of(page)
        for words in COMMAND.findall(piece)
    }
    assert told | {"demo"} == set(COMMANDS)


@EACH_PAGE
def test_environment_names_are_settings(page):
    known = {PREFIX + name.upper() for name in Settings.model_fields} | OTHER_NAMES | WRONG_NAMES
    assert set(re.findall(r"\bCOST_METER_[A-Z0-9_]+[A-Z0-9]", page.read_text())) <= known


@EACH_PAGE
def test_header_names_are_those_of_the_code(page):
    cost = reply.ReplyCost(1, 1, 0, 1, 1, 1, "id", "tenant", "tokens")
    spent = Standing(Budget("b", 1, "usd", "day", tenant="t"), {0: 1}, 0)
    of_budgets = [
        *warning((spent,), Owner("t"), is_coarse=False),
        *refusal(Verdict("blocked", spent), Owner("t"), "", is_coarse=False).headers,
    ]
    sent = {name.decode() for name, _ in (*reply.headers(cost), *of_budgets)} | {
        BILL_KEY,
        PROOF_HEADER,
        COMMENT_HEADER.decode(),
    }
    assert set(re.findall(r"\bx-cost-meter-[a-z-]+[a-z]", page.read_text())) <= sent


@EACH_PAGE
def test_files_that_are_named_exist(page):
    for piece in code_of(page):
        for name in re.findall(
            r"(?<![\w/.])((?:tests|csrc|docs|scripts|benchmarks|vllm_cost_meter)/[^\s)]*)", piece
        ):
            assert (ROOT / name).exists(), piece
        # A module may be named by the end of its path; vLLM's are not here.
        for name in re.findall(r"(?<![\w/.*])(?!vllm/)([\w/]+\.pyx?)\b", piece):
            assert any(f"/{path}".endswith(f"/{name}") for path in FILES), piece


@EACH_PAGE
def test_modules_that_are_named_can_be_imported(page):
    for piece in code_of(page):
        for name in re.findall(r"\bvllm_cost_meter(?:\.\w+)+", piece):
            if page.name != "CHANGELOG.md" and not name.endswith(".md"):
                assert resolve(name) is not None, piece


def test_the_report_in_the_readme_adds_up():
    report = README.read_text().partition("$ vllm-cost-meter report\n")[2]
    table, _, after = report.partition("    adds up: the rows are all of ")
    table, own, _ = table.partition("    each row is a tenant on its own, without those below it\n")
    head, *rows = [line.split() for line in table.splitlines()]
    assert own
    assert head[-3:] == ["gpu_seconds", "cost_usd", "split_within"]
    total, shown = Decimal(after.split()[0]), sum(Decimal(row[-3]) for row in rows)
    # Each row is shown to the microsecond.
    assert abs(total - shown) < Decimal("0.000001") * len(rows)
    [request] = [row for row in rows if not row[0].startswith("__")]
    assert request[0] == re.search("x-cost-meter-tenant: (.*)", README.read_text())[1]
    assert request[-2] == re.search("x-cost-meter-cost-usd: (.*)", README.read_text())[1]


def test_the_bill_of_the_demo_adds_up():
    bill, _, after = QUICKSTART.read_text().partition("    the bill\n")[2].partition("    sum:")
    rows = {row.split()[0]: row.split()[1:] for row in bill.splitlines() if row.split()}
    heading, total = rows.pop("tenant"), rows.pop("total")
    assert heading == ["requests", "prompt", "cached", "output", "GPU", "seconds", "USD"]
    for place in (-1, -2):
        assert sum(Decimal(row[place]) for row in rows.values()) == Decimal(total[place])
    assert after.startswith(f" the rows are all of {total[-2]} s wall x GPUs\n")
    tenants = {name: row for name, row in rows.items() if not name.startswith("__")}
    for place in range(4):
        assert sum(int(row[place]) for row in tenants.values()) == int(total[place])


def headers_shown() -> list[dict[str, str]]:
    """The blocks of headers that README and quickstart show."""
    blocks = [
        re.findall(r"^    +(x-[a-z-]+): (.+)$", block, re.MULTILINE)
        for page in (README, QUICKSTART)
        for block in re.findall(r"(?:^    +x-.*\n)+", page.read_text(), re.MULTILINE)
    ]
    return [dict(block) for block in blocks]


@pytest.mark.parametrize("shown", headers_shown(), ids=lambda shown: shown["x-cost-meter-tenant"])
def test_the_headers_that_are_shown_are_those_that_are_sent(shown):
    gpu_time_ns = int(Decimal(shown["x-cost-meter-gpu-seconds"]) * 10**9)
    cost = reply.ReplyCost(
        gpu_time_ns=gpu_time_ns,
        prefill_ns=0,
        decode_ns=gpu_time_ns,
        cost_nanousd=int(Decimal(shown["x-cost-meter-cost-usd"]) * 10**9),
        marginal_ns=0,
        marginal_cost_nanousd=int(Decimal(shown["x-cost-meter-marginal-cost-usd"]) * 10**9),
        http_request_id=shown["x-cost-meter-request-id"],
        tenant=shown["x-cost-meter-tenant"],
        method="tokens",
    )
    sent = reply.headers(cost)
    assert {name.decode(): value.decode() for name, value in sent} == shown


@pytest.mark.parametrize("page", [README, DOCS / "explanation" / "scope.md"], ids=lambda p: p.name)
def test_the_errors_that_are_told_are_those_of_the_whole_table(page):
    shown = section(DOCS / "explanation" / "attribution.md", "How wrong is it?")
    rows = {row[0].strip("`"): row for row in table_rows(shown) if row[0].strip("`") in SCENARIOS}
    assert rows.keys() == SCENARIOS.keys()

    def errors(column: int) -> dict[str, float]:
        return {name: abs(float(row[column].split()[-1])) for name, row in rows.items()}

    by_server = errors(2)
    half = by_server.pop("lora-64-always")  # Nothing tells what LoRA adds there: told by itself.
    large, small = by_server.values(), [errors(3)[name] for name in by_server]
    text = " ".join(page.read_text().split())
    assert 45 < half < 55
    assert "On the last one, where every step has LoRA from the start, its tenant paid half" in text
    assert f"On {len(large)} of {len(rows)} servers that are simulated kernel by kernel" in text
    assert f"was charged within {math.ceil(max(large))} % of the truth" in text
    assert f"within 2 % on {sum(error <= 2 for error in large)} of them" in text
    assert f"tiny prompts beside them were up to {max(small):.0f} % off" in text
