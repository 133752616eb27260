"""A base checkpoint read as if an adapter had been merged into it: which tensors, which update, and its arithmetic."""
