"""Who is let into the gateway, and who waits there: requests on their way, the queue, the token bucket."""
