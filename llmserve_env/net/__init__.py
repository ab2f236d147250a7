"""URLs and sockets."""
