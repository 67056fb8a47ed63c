"""Write completions: prompts in, token ids and texts out, many rows at a time."""
