"""What is right in a run's life: legal appends, whose turn it is, who has missed what. No clock, no I/O."""
