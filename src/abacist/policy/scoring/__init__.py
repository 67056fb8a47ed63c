"""Log-probabilities of completions: packed without padding, layer by layer, by a chunked head."""
