"""The points of the search: budgets, tables, spaces, seeds and descents, as arrays alone."""
