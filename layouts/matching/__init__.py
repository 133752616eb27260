"""Match the names of a checkpoint against the tables."""
