"""Short trainings of whole models within a recipe: the loop, its checkpoints, and what it is told."""
