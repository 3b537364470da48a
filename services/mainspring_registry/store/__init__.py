"""What the registry remembers, in PostgreSQL's schema `registry`."""
