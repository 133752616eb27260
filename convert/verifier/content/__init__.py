"""The digest of what a checkpoint holds, which is the same in every layout and format.

In: an open checkpoint. Out: `Content`: a sha256 of a sorted list with a line for each logical tensor. It shares no code with
what fuses, and never leaves out a tensor.

A line is a JSON array, `[name, dtype, shape, sha256]`. Gate, up and down of each expert, and each of their companions, are
tensors of their own, without padding, with the axes in one order: out, then in, as `nn.Linear` stores them. The name of such
a slice is an array as well, `[place, expert, "gate", part]`, so that no other tensor can have it. All others go by their names,
and what a MaxText tree holds by the names and axes that it has in Hugging Face, where the tables know these. So it does not
matter where things are stored, nor in what order.

It is sha256, and not xxh3 as in manifests, because somebody signs it. Manifests guard against accidents; below a signature it
must not be possible to find another checkpoint with the same digest. A sum of hashes would not depend on the order either, but
can be forged (Wagner's generalized birthday), and to sort names that are all different costs nothing.
"""
