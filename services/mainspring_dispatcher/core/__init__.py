"""What is right for a call: where it may go, what a loss means, what an outcome may say. No clock, no I/O."""
