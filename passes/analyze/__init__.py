"""Facts about a match: escapes, cost, density."""
