"""What the state service remembers: PostgreSQL's schema `state`, and the channel on Redis."""
