"""Look after a SQLite ledger: check, back up, restore, merge, compact, repair and migrate it.

`sqlite_files` names, makes and publishes files; `alone` keeps other processes away. Each command
then has a module of its own. Nothing here opens the ledger's own file but by SQLite, or in a
process that has no SQLite connection to it: closing any descriptor of a file drops all locks of the
process on it, and a command beside the server would then remove the log that the server writes to.
"""
