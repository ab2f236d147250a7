"""What a result is reported with: figures, intervals, and where it comes from."""
