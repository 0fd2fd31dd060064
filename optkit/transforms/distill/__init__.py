"""A model that learns from another one's answers."""
