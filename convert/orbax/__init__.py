"""Write Orbax checkpoints."""
