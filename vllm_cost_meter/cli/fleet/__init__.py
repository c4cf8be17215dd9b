"""The commands `fleet ...`: what the servers of a fleet share, and its database."""

from vllm_cost_meter.cli.fleet.database import migrate, tidy
from vllm_cost_meter.cli.fleet.settings import app as settings
from vllm_cost_meter.cli.options import new_group

app = new_group("fleet")
app.add_typer(settings, help="Show and change the settings that a fleet's servers share.")
app.command()(migrate)
app.command()(tidy)

__all__ = ["app"]
