"""Write Orbax checkpoints: the ways, when each is taken, and what each costs in memory.

An Orbax checkpoint is a tree of arrays. Each array is cut into chunks, and each chunk is compressed by itself. Reading any
element means decoding its whole chunk. So the cost of a conversion depends on the chunks of the input, chosen when Orbax
saved, and on those of the output, which are ours to choose. `write.OrbaxWriter` takes one of three ways for a whole checkpoint.

1. Kept. Every chunk of the input is a chunk of the output, and only its name changes: the chunks of `wi_0` are the first
   columns of the grid of `wi`, and those of `wi_1` the last. `keep` finds out whether this holds for all arrays. `copy` copies
   the files byte for byte, at the speed of the disk, and hashes the stored chunks. `moves` gives them their new names: an OCDBT
   database keeps names and values apart, so only its tree of names is written anew; where each array is a directory, a file
   is copied under its new name. Nothing is decoded. Memory: one block of 8 MiB and 8 MiB for hashing for each worker.
   Taken when input and output are Orbax on a disk, no chunk has to be cut, and no array above 64 MB is a single chunk.
   With `--keep-chunks`, single chunks are kept as well. That is fast, but a restore onto many devices then decodes the whole
   array on each of them.

2. Cut anew. Arrays are decoded, assembled in boxes and stored in chunks of about 1 MiB. `chunks` walks a target cell by cell,
   where a cell is what one chunk of each source holds, so that each source chunk is decoded once. `fill` assembles boxes in
   several workers, hashes them, and hands them to TensorStore, which compresses and writes them. `item` holds the stored
   arrays: batches of about 1 GiB (`portions`), each a database of its own that one manifest then joins, or a directory for
   each array. Taken for every input that cannot be kept: Hugging Face, stores, arrays of one large chunk, other layouts.
   Memory: boxes, decoded chunks in a cache, and chunks on their way to the disk.

   With `--mesh`, chunks also end where the parts of its devices do (`mesh`), and none is kept.

3. Streamed. A chunk above 64 MB is not decoded as a whole. Its zstd stream is read from front to back, with a window of
   8 MiB (`layouts.orbax.stream`). It is a part of the second way, chosen for each array. It takes zstd or no compression, in C
   order, which is all that Orbax writes. Other codecs need room for two decoded chunks, and the error says how much that is.

`budget` finds the richest settings of the second and third way that fit into `--memory`, from shapes alone. The output is the
same for all settings but for how a database is cut into files.

The way from MaxText to Hugging Face reads arrays bit by bit, a tensor for each expert. A run on many devices saves chunks that
hold a part of every expert. So these arrays are read through windows (`layouts.windows`), larger parts that stay decoded, and
`convert.engine.reading` puts the tensors in the order of windows. `budget.reading_budget` cuts windows from `--memory`.

`metadata` makes what stands beside the arrays (`_METADATA`, shardings, texts) from `origin.Origin`: everything that an
Orbax input hands on, and MaxText's defaults for any other input. `_METADATA` is written last.
"""
