"""One module a version, with its statements in a file beside it."""
