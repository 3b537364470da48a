"""Restate: a server with a log of its own that calls services over HTTP and journals their steps."""
