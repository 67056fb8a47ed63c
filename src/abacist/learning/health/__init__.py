"""A run is never silently wrong: named pathologies with evidence and remedy."""
