"""Durability: staging directories, journals, manifests, the rename that publishes, several processes."""
