"""``abacist doctor``: checks of the machine, and what became of a run."""
