"""LangGraph with its PostgreSQL saver: a library that keeps a checkpoint of a graph's state after each of its steps."""
