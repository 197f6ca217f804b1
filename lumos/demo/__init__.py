"""A page and an HTTP API around one pipeline: one worker, one bounded queue, one folder. `python -m lumos demo` opens it."""
