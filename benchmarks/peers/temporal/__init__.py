"""Temporal's development server with a worker of its Python SDK."""
