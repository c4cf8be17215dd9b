"""The figures of a window, each one SQL statement that can be run by hand."""
