"""Who is let into the gateway, who waits there and who gives way: queue, token bucket, memory for bodies."""
