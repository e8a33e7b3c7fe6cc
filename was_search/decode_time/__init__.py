"""The time of a decoding step, predicted from sparsities, and budgets of it."""
