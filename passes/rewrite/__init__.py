"""Turn matches into plans and edit the graph."""
