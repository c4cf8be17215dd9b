"""On which line of a file a key stands, as far as its text can tell."""

import pytest

from vllm_cost_meter.config.loading import line_of

TEXT = """\
port = 1
# [[prices]] in a comment is no table
[[prices]]
amount = 1
  source="a"

[[ prices ]]  # the second
amount = 2
[[energy_prices]]
source = "b"
"""


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("prices", 0, "amount"), 4),
        (("prices", 0, "source"), 5),
        (("prices", 1, "amount"), 8),
        (("prices", 1, "source"), 7),
        (("prices", 1), 7),
        (("energy_prices", 0, "source"), 10),
        (("energy_prices", 0, "amount"), 9),
        (("prices", 2, "amount"), None),
        (("overheads", 0, "name"), None),
        (("prices",), None),
    ],
)
def test_a_key_is_found_in_the_table_it_is_of(path, line):
    assert line_of(TEXT, path) == line
