"""Aegra: a server that runs LangGraph graphs behind HTTP, with PostgreSQL for truth and Redis for queue and events."""
