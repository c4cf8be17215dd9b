"""Find the rows in a damaged file, page by page, whatever page of it is damaged.

SQLite reaches a page by the pages above it. If one of those is damaged, it loses all that is below.
Here the trees only say which table a page belongs to. A page that no tree reaches is given to the
one damaged table whose columns all its rows fit. Indexes are left out, and so is the list of free
pages, which hold old copies of rows.

Invariant: each row in a page that is not damaged itself is found, or its page is counted as one
that cannot be told apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from vllm_cost_meter.ledger.schema import schema_version
from vllm_cost_meter.ledger.upkeep.btree import (
    INTERIOR_INDEX,
    INTERIOR_TABLE,
    INTERIORS,
    LEAF_INDEX,
    LEAF_TABLE,
    NotACell,
    PageFile,
    PageRow,
    Value,
    cell_offsets,
    children,
    is_sound,
    kind_of,
    rows_of,
)
from vllm_cost_meter.ledger.upkeep.forms import TableForm, forms_of

_TABLE_PAGES = frozenset({INTERIOR_TABLE, LEAF_TABLE})
_INDEX_PAGES = frozenset({INTERIOR_INDEX, LEAF_INDEX})
_SCHEMA_KINDS = frozenset({"table", "index", "view", "trigger"})
_SCHEMA_COLUMNS = 5
_FIRST = "sqlite_master"


@dataclass(slots=True)
class Tree:
    """A table's or an index's pages as far as they can be reached from its root."""

    pages: set[int] = field(default_factory=set)
    # What is wrong with it: pages that should belong to it and cannot be read as such.
    damaged: set[int] = field(default_factory=set)
    cells: int = 0
    # A page that leads to others led to one twice: then there is another that none leads to.
    has_twice: bool = False


@dataclass(slots=True)
class TableLoss:
    """What could not be read of a table: pages, and cells in pages that can be read."""

    damaged_pages: int = 0
    damaged_rows: int = 0
    # The number of rows that were there, by a whole index or the table's own pages if all of them
    # can be read; None if it is unknown.
    rows_known: int | None = None
    # Its root may be another table's: they share pages, or an index lists other rows.
    is_suspect: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing of it is damaged."""
        return not (self.damaged_pages or self.damaged_rows or self.is_suspect)


@dataclass(frozen=True, slots=True)
class _Definition:
    kind: str
    name: str
    table: str
    root: int
    sql: str | None


class Salvage:
    """A damaged file that is read once: first what `losses` says, then the rows."""

    def __init__(self, pages: PageFile, free_list: tuple[int, int] | None) -> None:
        """`free_list` is the first page and the length of the list, None if they are unknown."""
        self._pages = pages
        self._free = self._free_pages(*free_list) if free_list else set()
        self._definitions = self._read_definitions()
        self.version = self._read_version()
        self.forms = forms_of(
            [(d.name, d.sql) for d in self._definitions if d.kind == "table" and d.sql],
            may_be_newer=self.version is None,
        )
        self._trees = {d.name: self._walk(d.root, self._kinds_in(d)) for d in self._definitions}
        self.tables_found = sum(
            d.kind == "table" and d.name in self.forms for d in self._definitions
        )
        self.unclear_pages = 0
        self._owners, self._contested = self._own()
        self.losses = {name: self._loss(name) for name in self.forms}
        self.foreign_tables = sorted(
            d.name
            for d in self._definitions
            if d.kind == "table" and d.name not in self.forms and not d.name.startswith("sqlite_")
        )

    def rows(self) -> Iterator[tuple[TableForm, tuple[Value, ...]]]:
        """Yield each row with its table: those of the trees first, then those of lost pages."""
        foreign = set(self.foreign_tables)
        lost: list[int] = []
        for page in range(1, self._pages.count + 1):
            owner = self._owners.get(page)
            if owner in self.forms:
                yield from self._rows_of_table(self.forms[owner], page, lost)
            elif page not in self._free and (owner is None or owner in foreign):
                # A table that is not ours may be one of ours whose name is damaged.
                lost.append(page)
        for page in lost:
            yield from self._rows_of_lost(page)

    # ---- which page belongs to what

    def _free_pages(self, trunk: int, count: int) -> set[int]:
        found: set[int] = set()
        while trunk and trunk not in found and len(found) <= count:
            try:
                data = self._pages.read(trunk)
            except NotACell:
                break
            found.add(trunk)
            length = int.from_bytes(data[4:8], "big")
            if length > len(data) // 4 - 2:
                break
            found |= {
                int.from_bytes(data[at : at + 4], "big") for at in range(8, 8 + 4 * length, 4)
            }
            trunk = int.from_bytes(data[:4], "big")
        return found if len(found) <= count else set()

    def _walk(self, root: int, kinds: frozenset[int]) -> Tree:
        """Return the pages below a root. A page of another kind is damaged, or not its own."""
        tree, waiting = Tree(), [root]
        while waiting:
            page = waiting.pop()
            if page in tree.pages or page in tree.damaged:
                tree.has_twice = True
                continue
            try:
                data = self._pages.read(page)
            except NotACell:
                tree.damaged.add(page)
                continue
            kind = kind_of(data, page)
            if kind not in kinds:
                tree.damaged.add(page)
                continue
            tree.pages.add(page)
            if not is_sound(data, page):
                tree.damaged.add(page)  # Some of its cells may be read all the same.
            offsets = cell_offsets(data, page)
            tree.cells += 0 if kind == INTERIOR_TABLE else len(offsets)
            if kind in INTERIORS:
                waiting += children(data, page)
        return tree

    def _read_definitions(self) -> list[_Definition]:
        """Return what the file says of its tables and indexes, from wherever it can be read."""
        tree = self._walk(1, _TABLE_PAGES)
        found = {d.name: d for page in sorted(tree.pages) for d in self._definitions_in(page)}
        if tree.damaged or not found:
            for page in range(2, self._pages.count + 1):
                if page not in tree.pages and page not in self._free:
                    for definition in self._definitions_in(page):
                        found.setdefault(definition.name, definition)
        return [*found.values(), _Definition("first", _FIRST, _FIRST, 1, None)]

    def _definitions_in(self, page: int) -> Iterator[_Definition]:
        for row in self._cells(page):
            if row is None or row.rowid is None or len(row.values) != _SCHEMA_COLUMNS:
                continue
            kind, name, table, root, sql = row.values
            if (
                isinstance(kind, str)
                and kind in _SCHEMA_KINDS
                and isinstance(name, str)
                and isinstance(table, str)
                and isinstance(root, int)
                and (sql is None or isinstance(sql, str))
            ):
                yield _Definition(kind, name, table, root, sql)

    def _kinds_in(self, of: _Definition) -> frozenset[int]:
        if of.kind == "index" or (of.name in self.forms and self.forms[of.name].without_rowid):
            return _INDEX_PAGES
        return _TABLE_PAGES

    def _read_version(self) -> int | None:
        """Return the version that the file says its schema has; None if it cannot be read."""
        for definition in self._definitions:
            if definition.kind == "table" and definition.name == schema_version.name:
                rows = [row for row in self._cells(definition.root) if row is not None]
                if len(rows) == 1 and rows[0].rowid is not None and rows[0].values == [None]:
                    return rows[0].rowid
        return None

    def _own(self) -> tuple[dict[int, str], set[int]]:
        """Return the tree of each page, and the pages that several trees claim and none has."""
        owners: dict[int, str] = {}
        contested: set[int] = set()
        for name, tree in self._trees.items():
            for page in tree.pages:
                if owners.setdefault(page, name) != name:
                    contested.add(page)
        for page in contested:
            del owners[page]
        return owners, contested

    def _loss(self, name: str) -> TableLoss:
        tree = self._trees.get(name)
        if tree is None:  # Its definition is lost, and its root with it.
            return TableLoss(damaged_pages=1)
        whole = [
            self._trees[d.name].cells
            for d in self._definitions
            if d.kind == "index"
            and d.table == name
            and not self._trees[d.name].damaged
            and " WHERE " not in (d.sql or "").upper()
        ]
        listed = max(whole, default=None)
        is_suspect = (
            tree.has_twice or bool(tree.pages & self._contested) or listed not in (None, tree.cells)
        )
        if listed is None and not tree.damaged and not is_suspect:
            listed = tree.cells
        return TableLoss(len(tree.damaged), 0, listed, is_suspect)

    # ---- the rows of a page

    def _cells(self, page: int) -> Iterator[PageRow | None]:
        try:
            data = self._pages.read(page)
        except NotACell:
            return
        if kind_of(data, page) is not None:
            yield from rows_of(self._pages, page, data)

    def _rows_of_table(
        self, form: TableForm, page: int, lost: list[int]
    ) -> Iterator[tuple[TableForm, tuple[Value, ...]]]:
        cells = list(self._cells(page))
        fitting = [row and form.values_of(row) for row in cells]
        if cells and not any(fitting):
            lost.append(page)  # A damaged page above it may have led to it by mistake.
            return
        self.losses[form.name].damaged_rows += sum(values is None for values in fitting)
        yield from ((form, values) for values in fitting if values)

    def _rows_of_lost(self, page: int) -> Iterator[tuple[TableForm, tuple[Value, ...]]]:
        """Yield the rows of a page that no tree reaches, if one table alone can have them."""
        rows = [row for row in self._cells(page) if row is not None]
        if not rows:
            return
        forms = [form for form in self.forms.values() if not self.losses[form.name].is_whole]
        fitting = [form for form in forms if all(form.values_of(row) for row in rows)]
        # Of tables that could have the rows, those lack the fewest columns whose rows they are.
        width = max(len(row.values) for row in rows)
        least = min((len(form.stored) - width for form in fitting), default=0)
        best = [form for form in fitting if len(form.stored) - width == least]
        if len(best) == 1:
            for row in rows:
                if values := best[0].values_of(row):
                    yield best[0], values
        elif best:
            self.unclear_pages += 1
