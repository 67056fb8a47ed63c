"""The command line: one short file per verb; the errors of all are turned into words in one."""
