"""Doors to other projects: our problems, prompt and rewards as they take them."""
