"""Drivers on the vendors' own libraries. The twin serves the same drivers."""
