"""GSM8K with other numbers, by its calculator annotations."""
