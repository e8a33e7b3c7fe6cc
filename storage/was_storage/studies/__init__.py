"""Statements on the tables, by what they keep: slots, Optuna's trials, controls, runs, caches, pages."""
