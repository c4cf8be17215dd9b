"""On which line of a TOML file a key stands: what a message adds so that nobody has to count.

`tomllib` tells values and no places. So the text is looked through for the header of the table and,
below it, for the key: enough for files as people write them. Where that finds nothing (a list
written inline, a key in quotes) there is no line, and the message names the key only.

Invariant: what is returned is a line on which the table or its key begins, or None.
"""

import re
from collections.abc import Sequence


def line_of(text: str, path: Sequence[int | str]) -> int | None:
    """Return the line, from 1, of a key such as ("prices", 1, "amount"); None if it is not found.

    A key that is missing is looked for in vain: then it is the line of its table.
    """
    if len(path) < 2 or not isinstance(path[1], int):
        return None
    lines = text.splitlines()
    header = re.compile(rf"\s*\[\[\s*{re.escape(str(path[0]))}\s*\]\]")
    headers = [number for number, line in enumerate(lines) if header.match(line)]
    if path[1] >= len(headers):
        return None
    first = headers[path[1]]
    key = re.compile(rf"\s*{re.escape(str(path[2]))}\s*=") if len(path) > 2 else None
    for number, line in enumerate(lines[first + 1 :], first + 1):
        if key is not None and key.match(line):
            return number + 1
        if re.match(r"\s*\[", line):
            break
    return first + 1
