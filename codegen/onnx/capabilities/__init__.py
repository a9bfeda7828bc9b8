"""What each runtime runs, as data."""
