"""How the changed model executes; no weight is touched."""
