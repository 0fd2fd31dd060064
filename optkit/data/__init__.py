"""Texts for training, calibration and evaluation, from this machine or the Hub."""
