"""W&B, Trackio and TensorBoard: what each is told of a run, and that none can stop it."""
