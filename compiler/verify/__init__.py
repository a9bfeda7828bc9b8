"""Compare rewritten sites and whole models with the originals."""
