"""What stands beside the tensors, and whether an output is still what its manifest says."""
