"""The simulator: one jitted kernel, its records, and the backend over it."""
