"""A training script of another project, read into a configuration; nothing of it is run."""
