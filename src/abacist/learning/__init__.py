"""HOW IT LEARNS: configuration, the trainer, and the one place where a run is assembled."""
