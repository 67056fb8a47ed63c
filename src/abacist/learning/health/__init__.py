"""A run is never silently wrong: named faults with evidence and remedy."""
