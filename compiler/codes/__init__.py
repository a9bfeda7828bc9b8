"""The stable codes of reports: what each says, and what to do about it."""
