"""The versions of a fleet's tables, as Alembic scripts: `versions/`, one after the other.

The statements of a version never change once it was released. Views follow from the tables, so each
migration makes them anew, all of them (`migrating.py`).
"""
