"""What several upstreams tell, as one."""
