"""What crosses the wire: requests, answers, refusals and errors."""
