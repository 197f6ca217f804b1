"""The demo: a web page and an HTTP API around one pipeline, started by `python -m lumos demo`.

One worker thread makes the clips, one bounded queue holds the waiting requests, and one folder
holds all files.
"""
