"""One copy of a model held by several processes: shards of its layers, stages of its blocks, and what passes between them."""
