"""What running vLLM servers are asked, tell and can be told."""
