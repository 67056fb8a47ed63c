"""What is kept: every rollout, and the directory of a run."""
