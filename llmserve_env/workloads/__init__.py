"""Requests: traces, generators, tenants."""
