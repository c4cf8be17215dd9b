"""The version of the meter."""

__version__ = "0.1.0"
