"""Sparse forms: BOUNDED, opted into."""
