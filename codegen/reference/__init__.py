"""The executed spec as a backend."""
