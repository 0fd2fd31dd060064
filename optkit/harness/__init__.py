"""The trial: processes, turns, statistics, verdicts."""
