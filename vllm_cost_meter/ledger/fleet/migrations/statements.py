"""The statements of a version, from the file beside its module."""

from importlib.resources import files

from alembic import op


def run_file(name: str) -> None:
    """Execute a file's statements; each one ends with a line that ends with a semicolon."""
    text = files("vllm_cost_meter.ledger.fleet.migrations.versions").joinpath(name).read_text()
    for statement in text.split(";\n"):
        if statement.strip():
            op.execute(statement.strip())
