"""A run is never lost: sound checkpoints, exact state, orderly stops."""
