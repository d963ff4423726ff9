"""Few pictures without labels, and none."""
