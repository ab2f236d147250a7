"""The simulator fitted to a running server, and held against one."""
