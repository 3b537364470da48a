"""What runs when nobody calls: the committer, the fan-out to watchers, the talk between state processes, the leases."""
