"""What cbpq costs."""
