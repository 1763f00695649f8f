"""Vectors to an index that can be searched."""
