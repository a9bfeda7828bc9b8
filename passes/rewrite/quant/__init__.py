"""Quantized forms: BOUNDED, opted into."""
