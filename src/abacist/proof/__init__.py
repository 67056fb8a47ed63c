"""HOW WE KNOW that a model has learned: evaluation, comparison, statistics."""
