"""Fewer weights, or fewer layers."""
