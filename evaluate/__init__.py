"""How well an agent serves: what its scores amount to, and how sure that is."""
