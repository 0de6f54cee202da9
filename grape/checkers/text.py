"""Checkers of the text itself."""
