"""The negative control: would a level notice? One bit of one tensor is flipped in memory, and the same verification runs again.

In: two open checkpoints that were compared. Out: `Trial`s. It never writes.
"""
