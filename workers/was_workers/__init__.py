"""Ray: the worker process, the pool of workers, and jobs. What workers are asked is in `was_search.coordinator`."""
