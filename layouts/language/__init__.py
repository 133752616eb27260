"""The language of layouts: key templates, axis patterns, and the parts of a projection."""
