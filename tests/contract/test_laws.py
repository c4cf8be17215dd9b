"""The laws of the code base, each a test whose name is the law.

Goal: the structure that docs/architecture promises stays true without anyone having to remember it.
Method: the sources are parsed, never imported, so this runs without vLLM, in a second, and sees
imports inside functions too. The laws know folders, not files: a new file is under them as soon as
it is saved.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "vllm_cost_meter"

# The import law: a file imports its own room and lower floors only. A room is a folder of the
# package, or a file beside those folders.
FLOORS: dict[int, set[str]] = {
    0: {"errors", "logs", "plots", "units", "version"},
    1: {"console", "guard", "records", "side_process"},
    2: {"attribution", "economics", "journal", "prices", "tenants"},
    3: {"engine", "invoices", "reports"},
    4: {"activation", "config", "exchange", "ledger", "metrics"},
    5: {"endpoint", "vllm_hooks"},
    6: {"api_server", "lab"},
    7: {"__init__", "middleware", "plugin", "stats"},
    8: {"cli"},
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
# What each room may import besides the standard library, and lower floors.
THIRD_PARTIES: dict[str, set[str]] = {
    "api_server": {"fastapi", "msgspec", "orjson", "starlette"},
    "cli": {"rich", "typer"},
    "config": {"genai_prices", "pydantic", "pydantic_settings", "tomlkit"},
    "console": {"rich"},
    "endpoint": {"fastapi", "msgspec", "orjson", "prometheus_client", "pydantic", "starlette"}
    | {"typing_extensions", "uvicorn"},
    "engine": {"msgspec", "pynvml"},
    "lab": {"matplotlib", "msgspec", "numpy", "openai", "prometheus_client", "pynvml", "rich"}
    | {"tokenizers", "torch", "transformers", "vllm"},
    "ledger": {"alembic", "duckdb", "orjson", "sqlalchemy", "typing_extensions"},
    "journal": {"msgspec"},
    "metrics": {"prometheus_client"},
    "plots": {"matplotlib"},
    "records": {"msgspec"},
    # TypedDict as pydantic needs it to describe answers, on Python 3.11.
    "reports": {"typing_extensions"},
    "side_process": {"msgspec"},
    "vllm_hooks": {"vllm"},
}
# What vLLM imports in the processes of an engine, and what would cost those processes memory and
# start-up for nothing.
ENGINE_ROOTS = {f"{PACKAGE}.plugin", f"{PACKAGE}.vllm_hooks.scheduler"}
NOT_IN_THE_ENGINE = {
    f"{PACKAGE}.{room}"
    for room in (
        *("api_server", "cli", "config.settings", "economics", "endpoint", "invoices", "lab"),
        *("ledger", "reports"),
    )
} | {"fastapi", "numpy", "pydantic", "sqlalchemy", "sqlite3", "starlette", "uvicorn"}
# These speak to a person at a terminal; everything else logs or returns.
PRINTERS = {"cli", "console", "lab"}

# Names of types that two modules define for one and the same idea: the shape that an answer has,
# and what the rest of the code computes with.
ONE_IDEA_IN_TWO_SHAPES = {
    # Engines of one kind: as `/cost/economics` lists them, and the ones that a sweep measures.
    "Deployment",
    # A stretch of a report: exact, and as `series` lists it.
    "Piece",
}

LONGEST_FUNCTION = 70
LONGEST_FILE = 500
MOST_MODULES_OF_A_FOLDER = 20
MOST_FILES_ON_TOP = 12


class Import(NamedTuple):
    module: str
    line: int
    at_load: bool  # runs when the module is imported: not in a function, not for type checkers


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
# Built from csrc/, not parsed.
NATIVE = {f"{PACKAGE}.attribution._native"}
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
                name = inner if inner in MODULES or inner in NATIVE else base
                found.append(Import(name, node.lineno, at_load))
    return found


def is_in(module: str, names: set[str]) -> bool:
    """Return whether `module` is one of `names` or inside one."""
    return any(module == name or module.startswith(name + ".") for name in names)


def where(module: str, line: int) -> str:
    return f"{MODULES[module].relative_to(ROOT)}:{line}"


def room_of(module: str) -> str:
    """Return the room a module of ours is in; the package itself is the room `__init__`."""
    return module.split(".")[1] if "." in module else "__init__"


def is_ours(module: str) -> bool:
    return is_in(module, {PACKAGE})


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


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of nodes that reach each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(edges[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            place = stack.index(node)
            group, stack[place:] = stack[place:], []
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(edges):
        if node not in index:
            visit(node)
    return found


def test_the_sources_are_found() -> None:
    assert f"{PACKAGE}.records.bill" in MODULES
    assert PACKAGE in loaded_with({f"{PACKAGE}.records.bill"})


def test_every_room_has_a_floor() -> None:
    assert {room_of(module) for module in MODULES} == set(FLOOR_OF)


def test_a_file_imports_its_own_room_and_lower_floors_only() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module}"
        for module in MODULES
        for entry in imports_of(module)
        if is_ours(entry.module)
        and room_of(entry.module) != room_of(module)
        and FLOOR_OF[room_of(entry.module)] >= FLOOR_OF[room_of(module)]
    ]
    assert wrong == []


def test_a_room_imports_only_the_third_parties_of_its_own() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module}"
        for module in MODULES
        for entry in imports_of(module)
        if not is_ours(entry.module)
        and entry.module.split(".")[0]
        not in sys.stdlib_module_names | THIRD_PARTIES.get(room_of(module), set())
    ]
    assert wrong == []


def test_the_table_of_third_parties_names_none_that_is_not_imported() -> None:
    used = {
        (room_of(module), entry.module.split(".")[0])
        for module in MODULES
        for entry in imports_of(module)
    }
    named = {(room, name) for room, names in THIRD_PARTIES.items() for name in names}
    assert named - used == set()


def test_no_files_import_each_other_in_a_circle() -> None:
    edges = {
        module: {entry.module for entry in imports_of(module) if entry.module in MODULES} - {module}
        for module in MODULES
    }
    assert circles(edges) == []


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_importing_the_engine_side_loads_no_settings_no_web_no_database_and_no_reports() -> None:
    wrong = [
        f"{where(module, entry.line)} imports {entry.module} (reached by {way})"
        for module, way in loaded_with(ENGINE_ROOTS).items()
        for entry in imports_of(module)
        if entry.at_load and is_in(entry.module, NOT_IN_THE_ENGINE)
    ]
    assert wrong == []


def test_the_side_endpoints_process_loads_neither_vllm_nor_metrics_of_its_own() -> None:
    """Metrics that it made would stand among those that vLLM's processes share in files."""
    loaded = loaded_with({f"{PACKAGE}.endpoint.process"})
    unwanted = {f"{PACKAGE}.{room}" for room in ("api_server", "metrics", "vllm_hooks")}
    assert {module: way for module, way in loaded.items() if is_in(module, unwanted)} == {}


def test_hooks_speak_to_the_engines_meter_and_reach_through_it_to_nothing() -> None:
    wrong = [
        where(module, node.lineno)
        for module, path in MODULES.items()
        if room_of(module) == "vllm_hooks"
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and node.attr == "books"
    ]
    assert wrong == []


def test_only_what_speaks_at_a_terminal_prints() -> None:
    wrong = [
        where(module, node.lineno)
        for module, path in MODULES.items()
        if room_of(module) not in PRINTERS
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert wrong == []


def own_logging(tree: ast.Module) -> list[int]:
    """Return the lines that make a logger or log past the meter's own."""
    makes = {"basicConfig", "getLogger", "init_logger"}
    logs = {"critical", "debug", "error", "exception", "info", "log", "warning"}
    return [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Name) and node.id in makes)
        or (isinstance(node, ast.Attribute) and node.attr in makes)
        or (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "logging")
        and node.attr in logs
    ]


def test_only_one_module_makes_a_logger_so_that_all_lines_are_where_vllms_are() -> None:
    wrong = [
        where(module, line)
        for module, path in MODULES.items()
        if module != f"{PACKAGE}.logs"
        for line in own_logging(TREES[path])
    ]
    assert wrong == []


def test_loggers_of_ones_own_are_found() -> None:
    source = "logger = logging.getLogger(__name__)\ninit_logger('x')\nlogging.error('x')"
    assert own_logging(ast.parse(source)) == [1, 2, 3]
    assert own_logging(ast.parse("logger = meter_logger()\nlogger.error(logging.ERROR)")) == []


def test_a_folder_holds_few_modules() -> None:
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        folders[path.parent] = folders.get(path.parent, 0) + 1
    top = folders.pop(ROOT / PACKAGE)
    assert top <= MOST_FILES_ON_TOP
    crowded = {str(f.relative_to(ROOT)): n for f, n in folders.items()}
    assert {name: n for name, n in crowded.items() if n > MOST_MODULES_OF_A_FOLDER} == {}


def test_every_module_says_what_it_is_for() -> None:
    wrong = [
        str(path.relative_to(ROOT))
        for path in MODULES.values()
        if not ast.get_docstring(TREES[path])
    ]
    assert wrong == []


def types_of(tree: ast.Module) -> Iterator[str]:
    """Yield the public classes and type aliases of a module: names such as `Price` or `PriceOf`."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        # Constants are all capitals, private names begin with an underscore, and a type variable
        # such as `T` stands for any type.
        yield from (name for name in names if name[0].isupper() and not name.isupper())


def test_a_type_has_a_name_of_its_own() -> None:
    places: dict[str, list[str]] = {}
    for module, path in MODULES.items():
        for name in types_of(TREES[path]):
            places.setdefault(name, []).append(module)
    shared = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert {name: shared[name] for name in shared if name not in ONE_IDEA_IN_TWO_SHAPES} == {}
    assert set(shared) == ONE_IDEA_IN_TWO_SHAPES


def test_types_are_found() -> None:
    source = (
        "class Part:\n    class In: ...\nPriceOf = int\nRate: type = int\nMAX = T = 1\n_Row = str"
    )
    assert list(types_of(ast.parse(source))) == ["Part", "PriceOf", "Rate"]


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
        ("from vllm_cost_meter.records import bill", [("vllm_cost_meter.records.bill", True)]),
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


def test_the_journal_touches_the_disk_through_one_module() -> None:
    """What went past it would be neither simulated nor found out."""
    past_it = [
        where(module, node.lineno)
        for module in MODULES
        if module.startswith(f"{PACKAGE}.journal.") and module != f"{PACKAGE}.journal.files"
        for node in ast.walk(TREES[MODULES[module]])
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in {"os", "fcntl"}
        and not node.attr.startswith("O_")
        and node.attr != "register_at_fork"
    ]
    assert past_it == []
