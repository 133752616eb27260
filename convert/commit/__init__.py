"""Durability: the output is absent or complete. The only home of renames, journals and manifests."""
