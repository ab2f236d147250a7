"""Model predictive control: the agent, and what it knows of the cell and its traffic."""
