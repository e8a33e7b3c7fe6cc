"""Runs of more than one target, and targets that follow from studies."""
