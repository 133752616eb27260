"""Checkpoints in a pipeline: from files straight to devices and back, and from a trainer's tree to a server's.

    request.py   what is asked for: a plan whose targets are the leaves, their names, and how these are held
    kinds.py     of each leaf: type, and the part of each device
    read.py      a checkpoint as a tree, at once or lazily
    load.py      the leaves of a plan as arrays on devices, each of which reads its own part
    lazy.py      a leaf that is read when it is asked for
    back.py      the same plan the other way round, and a tree as the checkpoint that it is read from
    computed.py  values that MaxText has others of, on that way back
    save.py      a tree, written as the files that it was loaded from
    sync.py      a tree as another program holds it, within one jitted function

There is one engine: the plans and the block copies of `convert.planning` and `convert.engine`, which files go through, too.
"""
