"""WHAT LEAVES a run: artefacts that are proven to be the trained policy, and results to check."""
