"""Read Orbax checkpoints: the tree, the arrays, and their chunks as they are stored."""
