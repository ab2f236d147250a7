"""Experiments: one for each published table, and the report that prints it."""
