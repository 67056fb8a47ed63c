"""What a run will cost on this machine, estimated before it begins."""
