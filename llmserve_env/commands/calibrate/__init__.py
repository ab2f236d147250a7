"""Fit a profile: to kernel times, to a predictor's iterations, or to a running server."""
