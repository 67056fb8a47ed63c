"""WHAT A PERSON SEES while a model trains, and when it is done."""
