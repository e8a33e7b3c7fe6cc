"""The coordinator of a search: it chooses vectors, hands them out and takes results in."""
