"""The page at /web/."""
