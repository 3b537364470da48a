"""What tests share: base class, running stack, clients, waiting. Holds no test and no double of our own code."""
