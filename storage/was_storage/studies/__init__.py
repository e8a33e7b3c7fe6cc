"""Studies in the database: slots, Optuna's trials, controls, caches."""
