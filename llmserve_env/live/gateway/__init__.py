"""The gateway: what stands before running servers, decides what they get and measures what they give."""
