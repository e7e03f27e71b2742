"""SQL as a thing to compare."""
