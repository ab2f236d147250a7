"""Requests at upstreams: their answers on the way to clients, and what time tells of them."""
