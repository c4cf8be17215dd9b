"""The journal: what a process bills, appended to files of its own before a client is told a cost.

docs/reference/journal.md describes the format.
"""
