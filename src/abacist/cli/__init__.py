"""The command line: one short file per verb; ``console`` turns their errors into messages."""
