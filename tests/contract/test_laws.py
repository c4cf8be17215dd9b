"""The laws of the code base, each a test whose name is the law.

Goal: the structure that the design promises stays true without anyone having to remember it.
Method: the sources are parsed, never imported, so this runs without vLLM, in a second, and sees
imports inside functions too. Modules that do not exist are not missed: files are globbed.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_cost_meter"

# Values and arithmetic: the standard library and each other.
CORE = {
    f"{PACKAGE}.records",
    f"{PACKAGE}.errors",
    f"{PACKAGE}.guard",
    f"{PACKAGE}.pricing",
    f"{PACKAGE}.price_book",
    f"{PACKAGE}.price_rates",
    f"{PACKAGE}.overheads",
    f"{PACKAGE}.tenants",
    f"{PACKAGE}.attribution",
    f"{PACKAGE}._attribution_c",
    f"{PACKAGE}._attribution_py",
    f"{PACKAGE}._fit_py",
    f"{PACKAGE}._shapley_py",
    f"{PACKAGE}._requests_py",
    f"{PACKAGE}.accrued",
    f"{PACKAGE}.priors",
    f"{PACKAGE}.books",
    f"{PACKAGE}.energy_shares",
    f"{PACKAGE}.energy_books",
    f"{PACKAGE}.energy_records",
    f"{PACKAGE}.windows",
    f"{PACKAGE}.text",
    f"{PACKAGE}.rounding",
    f"{PACKAGE}.invoices",
    f"{PACKAGE}.idle",
    f"{PACKAGE}.grammar",
    f"{PACKAGE}.reports",
    f"{PACKAGE}.statement",
}
# What runs inside EngineCore and the workers, or is imported there by vLLM's plugin loader.
ENGINE_SIDE = {
    f"{PACKAGE}.{name}"
    for name in (
        "engine",
        "plugin",
        "_vllm",
        "books",
        "attribution",
        "records",
        "wire",
        "step_log",
        "energy",
        "energy_shares",
        "energy_books",
        "energy_meter",
    )
}
# They would cost the engine's process memory and start-up for nothing.
NOT_IN_THE_ENGINE = {
    "numpy",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "sqlite3",
    f"{PACKAGE}.ledger",
    f"{PACKAGE}.validation",
}
# These speak to a person at a terminal; everything else logs or returns.
PRINTERS = {
    f"{PACKAGE}.{name}"
    for name in (
        "break_even_commands",
        "budget_commands",
        "calc_commands",
        "cli",
        "compare_commands",
        "demo",
        "doctor",
        "economics_commands",
        "invoice_commands",
        "report_commands",
        "sweep_commands",
        "tenant_commands",
        "terminal",
    )
}

LONGEST_FUNCTION = 70
LONGEST_FILE = 500


class Import(NamedTuple):
    module: str
    line: int
    at_load: bool  # runs when the module is imported: not in a function, not for type checkers


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
SOURCES = sorted(
    path
    for folder in (PACKAGE, "tests", "benchmarks", "scripts")
    for path in (ROOT / folder).rglob("*.py")
)
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def nodes_with_load(tree: ast.AST, at_load: bool = True) -> Iterator[tuple[ast.AST, bool]]:
    for node in ast.iter_child_nodes(tree):
        yield node, at_load
        if is_for_type_checkers(node):
            assert isinstance(node, ast.If)
            for part, runs in ((node.body, False), (node.orelse, at_load)):
                block = ast.Module(body=part, type_ignores=[])
                yield from nodes_with_load(block, runs)
        else:
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from nodes_with_load(node, at_load and not function)


def imports_of(module: str) -> list[Import]:
    """Return what `module` imports, absolute; `from package import submodule` is the submodule."""
    path = MODULES[module]
    found = []
    for node, at_load in nodes_with_load(TREES[path]):
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno, at_load) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # A package is its own base: one dot less to cut.
                depth = node.level - (path.name == "__init__.py")
                parents = module.split(".")[: len(module.split(".")) - depth]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                name = inner if inner in MODULES or inner in CORE else base
                found.append(Import(name, node.lineno, at_load))
    return found


def is_in(module: str, names: set[str]) -> bool:
    """Return whether `module` is one of `names` or inside one."""
    return any(module == name or module.startswith(name + ".") for name in names)


def where(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def loaded_with(roots: set[str]) -> dict[str, str]:
    """Return every module of ours that importing `roots` loads, with the way it is reached."""
    ways = {root: root for root in sorted(roots & MODULES.keys())}
    queue = list(ways)
    while queue:
        module = queue.pop(0)
        parents = [module.rsplit(".", count)[0] for count in range(1, module.count(".") + 1)]
        reached = [entry.module for entry in imports_of(module) if entry.at_load]
        for name in [*reached, *parents]:
            if name in MODULES and name not in ways:
                ways[name] = f"{ways[module]} > {name}"
                queue.append(name)
    return ways


def test_the_sources_are_found() -> None:
    assert f"{PACKAGE}.records" in MODULES
    assert PACKAGE in loaded_with({f"{PACKAGE}.records"})


def test_core_imports_only_the_standard_library_and_core() -> None:
    allowed = set(sys.stdlib_module_names) | CORE | {PACKAGE}
    wrong = [
        f"{where(module, entry.line)} imports {entry.module}"
        for module in sorted(CORE & MODULES.keys())
        for entry in imports_of(module)
        if entry.module != PACKAGE and not is_in(entry.module, allowed - {PACKAGE})
    ]
    assert wrong == []


def test_importing_the_engine_side_loads_no_web_framework_no_database_and_no_ledger() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module} (reached by {way})"
        for module, way in loaded_with(ENGINE_SIDE).items()
        for entry in imports_of(module)
        if entry.at_load and is_in(entry.module, NOT_IN_THE_ENGINE)
    ]
    assert wrong == []


# The base class of vLLM's stat-logger plugins, which an entry point must subclass: public, and too
# heavy to import in every process.
STAT_LOGGER_BASE = (f"{PACKAGE}.stats", "vllm.v1.metrics.loggers")


def touches_vllm(module: str) -> bool:
    """Return whether a module is one of those that may: its name begins with `_vllm`."""
    return module.rpartition(".")[2].startswith("_vllm")


def test_only_modules_named_vllm_import_vllm() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module}"
        for module in MODULES
        if not touches_vllm(module)
        for entry in imports_of(module)
        if is_in(entry.module, {"vllm"}) and (module, entry.module) != STAT_LOGGER_BASE
    ]
    assert wrong == []


def test_nothing_imports_the_command_line() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module}"
        for module in MODULES
        if module != f"{PACKAGE}.__main__"
        for entry in imports_of(module)
        if is_in(entry.module, {f"{PACKAGE}.cli"})
    ]
    assert wrong == []


def test_only_what_speaks_at_a_terminal_prints() -> None:
    wrong = [
        where(module, node.lineno)
        for module, path in MODULES.items()
        if not is_in(module, PRINTERS)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / PACKAGE).rglob("__init__.py")
    }
    assert set(project["tool"]["setuptools"]["packages"]) == packages


def test_every_module_says_what_it_is_for() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if not ast.get_docstring(TREES[path])
    ]
    assert wrong == []


def test_a_function_fits_on_a_screen() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines"
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or node.lineno) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    assert wrong == []


def test_a_file_is_read_in_one_sitting() -> None:
    files = [*SOURCES, *sorted((ROOT / "csrc").glob("*.pyx"))]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    wrong = [
        f"{path.relative_to(ROOT)} has {length} lines"
        for path, length in lengths.items()
        if length > LONGEST_FILE
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import os.path", [("os.path", True)]),
        ("from vllm_cost_meter import records", [("vllm_cost_meter.records", True)]),
        ("from . import records", [("vllm_cost_meter.records", True)]),
        ("from .records import Usage", [("vllm_cost_meter.records", True)]),
        ("def f():\n    import vllm", [("vllm", False)]),
        ("class A:\n    import vllm", [("vllm", True)]),
        ("if TYPE_CHECKING:\n    import a\nelse:\n    import b", [("a", False), ("b", True)]),
        ("try:\n    import a\nexcept ImportError:\n    import b", [("a", True), ("b", True)]),
    ],
)
def test_the_reader_of_imports_reads(
    source: str, expected: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ROOT / PACKAGE / "imaginary.py"
    monkeypatch.setitem(MODULES, f"{PACKAGE}.imaginary", path)
    monkeypatch.setitem(TREES, path, ast.parse(source))
    found = [(entry.module, entry.at_load) for entry in imports_of(f"{PACKAGE}.imaginary")]
    assert found == expected
