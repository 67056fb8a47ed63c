"""The proof floor: how we know that a model has learned."""
