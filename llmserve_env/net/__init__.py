"""URLs, sockets and HTTP clients."""
