"""What runs when nobody calls: the catalog's copy, the lease, and the runs that this process drives."""
