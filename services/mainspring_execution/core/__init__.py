"""What is right for a run, decided on paper: its plan, the fold over its log, the next step, the events to record."""
