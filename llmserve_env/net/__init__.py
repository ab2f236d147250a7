"""URLs, sockets, HTTP clients, and loops in the background."""
