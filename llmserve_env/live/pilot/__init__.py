"""What stands between an agent and a live service: shield, limits, fallback, and the log of its decisions."""
