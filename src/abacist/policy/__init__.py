"""The model that learns: its chat template, its loading, its decoding."""
