"""Other platforms doing W1's work, each a program in an environment of its own (`make bench-peers`); all optional."""
