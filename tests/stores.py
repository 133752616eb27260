"""Store the arrays of an Orbax item again, cut otherwise."""

from contextlib import closing

import tensorstore as ts

from layouts.checkpoint import open_checkpoint


def store_again(item, chunk_of):
    """An item with other chunks, as a run on many devices saves it."""
    with closing(open_checkpoint(item)) as reader:
        for name, spec in reader.tensors.items():
            stored = f"{reader.leaves[name].stored}/"
            where = {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": f"file://{item}/", "path": stored}}
            values = ts.open(where).result().read().result()
            chunk = chunk_of(spec.shape)
            layout = ts.ChunkLayout(read_chunk_shape=chunk, write_chunk_shape=chunk)
            zstd = {"codecs": ["bytes", {"name": "zstd", "configuration": {"level": 1}}]}
            again = ts.open(
                where | {"metadata": zstd, "store_data_equal_to_fill_value": True},
                create=True,
                delete_existing=True,
                dtype=values.dtype.name,
                shape=spec.shape,
                chunk_layout=layout,
            ).result()
            again.write(values).result()


def cut(axis, parts):
    """The chunks of an array whose dimension `axis` (or its last one) is cut."""

    def chunk(shape):
        at = min(axis, len(shape) - 1)
        return tuple(max(1, -(-size // parts)) if i == at else size for i, size in enumerate(shape))

    return chunk
