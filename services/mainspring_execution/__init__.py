"""The execution service: what a run does next. Drives runs over their logs; stores nothing itself."""
