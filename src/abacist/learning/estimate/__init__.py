"""What a run will cost on this machine, said before it begins."""
