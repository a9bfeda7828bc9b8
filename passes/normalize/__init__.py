"""Turn the working copy of a graph into one spelling per meaning."""
