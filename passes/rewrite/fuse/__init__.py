"""Forms that keep the function: SAME."""
