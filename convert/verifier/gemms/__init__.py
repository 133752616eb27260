"""The experts of two checkpoints through grouped GEMMs, each in the form that its kernel takes; the only home of JAX."""
