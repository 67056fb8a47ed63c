"""The parts of a dry run: memory, time, solve rates; ``plan`` puts them together."""
