"""What everything stands on; imports nothing of optkit above it."""
