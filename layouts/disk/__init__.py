"""What touches disks and stores: paths, names, reads, and what is not there."""
