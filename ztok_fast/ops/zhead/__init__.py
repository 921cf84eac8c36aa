"""Z head: the next Z-token from the Z rows alone."""
