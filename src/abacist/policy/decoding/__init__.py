"""Write completions: prompts in, token ids out, many rows at a time."""
