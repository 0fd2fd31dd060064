"""Weights as products of thinner ones."""
