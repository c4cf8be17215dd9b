"""The list of all commands, and how each is loaded when it runs.

The list must appear at once, but the modules behind it take a second to load. So each command is a
line in a table here. Its module is imported when a user runs the command or asks for its help.

Exit status of all commands: 0 done; 1 the books do not balance, or a check failed; 2 wrong usage or
settings, with one line that says which.

Invariant: no domain module is loaded before a command is chosen.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

# The exit status that a shell reports for a command that SIGPIPE ended.
PIPE_CLOSED = 141


class CommandEntry(NamedTuple):
    """A command: its panel, the place of its function or app, and its line in the list."""

    panel: str
    place: str
    help: str


COMMANDS = {
    "report": CommandEntry(
        "See", "report:report", "What each tenant used and cost, idle time included."
    ),
    "statement": CommandEntry(
        "See", "report:statement", "A tenant's month, line by line to the cent."
    ),
    "explain": CommandEntry("See", "explain:explain", "How the bill of one request came about."),
    "audit": CommandEntry("See", "audit:audit", "Do the books balance? Exit status 1 if not."),
    "server": CommandEntry(
        "See", "server:server", "Answer all of this over HTTP: for a fleet, or any ledger."
    ),
    "prices": CommandEntry("Money", "prices:prices", "Which price holds when, by the settings."),
    "budgets": CommandEntry("Money", "budgets:budgets", "How much of each budget is used."),
    "tenants": CommandEntry(
        "Money", "tenants:app", "Add, change and list the tenants of the settings."
    ),
    "fleet": CommandEntry(
        "Money", "fleet:app", "Prices, tenants and budgets that a fleet's servers share."
    ),
    "invoice": CommandEntry("Money", "invoice:app", "Hold a provider's bill against the meter."),
    "economics": CommandEntry("Plan", "economics:economics_", "What a million tokens cost."),
    "compare": CommandEntry("Plan", "compare:compare_", "What the same requests cost at an API."),
    "break-even": CommandEntry(
        "Plan", "break_even:break_even_", "From which volume on hosting pays."
    ),
    "sweep": CommandEntry("Plan", "sweep:sweep", "Measure cost at one load after another."),
    "saturation": CommandEntry("Plan", "saturation:app", "Full load, as sweeps measured it."),
    "calc": CommandEntry("Plan", "calc:app", "The formulas of cost and load on your own numbers."),
    "doctor": CommandEntry("Check", "doctor:doctor_", "Is the meter installed, and does it work?"),
    "ledger": CommandEntry(
        "Check", "ledger:app", "Check, back up, restore, merge, compact, repair a ledger."
    ),
    "validate": CommandEntry(
        "Check", "validate:validate", "How wrong each way to split a step is."
    ),
    "gpu-check": CommandEntry(
        "Check", "gpu_check:gpu_check", "What is the meter worth on this GPU? One page of it."
    ),
    "demo": CommandEntry(
        "Check", "demo:demo", "See it all without a GPU: a real server and its bill."
    ),
}


class LazyGroup(TyperGroup):
    """A group whose commands are stand-ins with one line of help, loaded when they are needed."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {
            name: TyperCommand(
                name, help=entry.help, rich_help_panel=entry.panel, rich_markup_mode=None
            )
            for name, entry in COMMANDS.items()
        }

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = load(args[0])
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands, panel by panel."""
        width = max(map(len, COMMANDS))
        for panel in dict.fromkeys(entry.panel for entry in COMMANDS.values()):
            with formatter.section(panel):
                formatter.write_dl(
                    [
                        (name.ljust(width), entry.help)
                        for name, entry in COMMANDS.items()
                        if entry.panel == panel
                    ]
                )

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        with closed_pipe_is_enough():
            return super().invoke(ctx)

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Read the words of the command line, which prints the list of commands for --help."""
        with closed_pipe_is_enough():
            return super().make_context(*arguments, **options)


@contextmanager
def closed_pipe_is_enough() -> Iterator[None]:
    """End quietly when the reader closes the pipe, as `head` does: it has seen enough."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Python flushes standard output again at exit, which would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(PIPE_CLOSED) from None


def load(name: str) -> Any:
    """Return a command, or a group of commands, with its options."""
    entry = COMMANDS[name]
    module, _, attribute = entry.place.partition(":")
    found = getattr(import_module(f"vllm_cost_meter.cli.{module}"), attribute)
    if not isinstance(found, typer.Typer):
        one = typer.Typer(add_completion=False, rich_markup_mode=None)
        one.command(name)(found)
        found = one
    command: Any = typer.main.get_command(found)
    command.name = name
    command.rich_help_panel = entry.panel
    command.short_help = entry.help
    if isinstance(command, TyperGroup):
        command.help = entry.help
    return command


def whole() -> TyperGroup:
    """Return the command line with all commands loaded, for readers of their help texts."""
    group = typer.main.get_group(app)
    for name in COMMANDS:
        group.commands[name] = load(name)
    return group


app = typer.Typer(
    name="vllm-cost-meter",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Brackets in help texts are brackets: [[prices]] is a table of the settings.
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """What the requests of a vLLM server cost: measured, per request and tenant."""
    if version:
        from vllm_cost_meter.version import __version__

        print(__version__)
        raise typer.Exit
