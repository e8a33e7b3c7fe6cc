"""Ray: the evaluation actor, the pool and the coordinator."""
