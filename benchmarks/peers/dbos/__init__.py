"""DBOS Transact: a library that keeps workflows and steps in PostgreSQL."""
