"""What Alembic runs to migrate: `migrating.py` gives it a connection, or asks for the SQL alone."""

from alembic import context

from vllm_cost_meter.ledger.fleet.migrating import drop_views, make_views
from vllm_cost_meter.ledger.fleet.schema import fleet_metadata

config = context.config
connection = config.attributes.get("connection")
if connection is None:
    context.configure(dialect_name="postgresql", output_buffer=config.output_buffer)
else:
    context.configure(connection=connection, target_metadata=fleet_metadata)
with context.begin_transaction():
    drop_views(context.execute)
    context.run_migrations()
    make_views(context.execute)
