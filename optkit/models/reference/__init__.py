"""The bundled reference model: weights, card, and the script that trained it."""
