"""Faults under load: everything is killed, stopped, cut off and filled up while runs go on, then checked whole."""
