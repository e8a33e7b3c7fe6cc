"""The steps of a run, one a module: each takes the context, keeps its result in the cache and returns a value."""
