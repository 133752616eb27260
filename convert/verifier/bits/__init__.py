"""Every weight of two checkpoints, bit for bit, read by the verifier's own reading of the language of layouts."""
