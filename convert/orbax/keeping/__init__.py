"""Stored chunks that stay as they are, under new names."""
