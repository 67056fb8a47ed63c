"""The view floor: what a person sees while a model trains, and when it is done."""
