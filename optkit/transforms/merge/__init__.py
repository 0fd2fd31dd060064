"""Several models of one shape as one, or side by side."""
