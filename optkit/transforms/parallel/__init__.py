"""Placement on several processes."""
