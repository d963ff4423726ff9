"""What cbpq is used for, and the studies of it."""
