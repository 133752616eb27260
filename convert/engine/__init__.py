"""What both formats use to copy blocks within a memory budget."""
