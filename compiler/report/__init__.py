"""What a rewrite did, as records, text and pages."""
