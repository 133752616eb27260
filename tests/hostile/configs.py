"""`config.json`, and the tree of an Orbax item: values of the wrong type, and such as take long."""

from collections.abc import Iterator
from typing import Any

from tests.hostile.variants import (
    COMPARE,
    DRY,
    ESCAPED,
    FEW,
    GONE,
    HF,
    ORBAX,
    PREFUSE,
    Change,
    Pointer,
    Sandbox,
    Table,
    edit,
    place,
    rare,
    text,
    wrong,
)

DEQUANTIZE = "--prefuse --dequantize bf16 {in} {out}"
WORDS: dict[str, tuple[str, ...]] = {
    "model_type": (PREFUSE, ORBAX),
    "num_experts": (PREFUSE, ORBAX),
    "num_hidden_layers": (ORBAX,),
    "num_attention_heads": (ORBAX,),
    "head_dim": (ORBAX,),
    "mlp_only_layers": (ORBAX,),
    "decoder_sparse_step": (ORBAX,),
    "text_config": (PREFUSE, ORBAX),
    "vision_config": (ORBAX,),
    "quantization_config": (PREFUSE, DEQUANTIZE),
    "transformers_version": (PREFUSE,),
    "tie_word_embeddings": (ORBAX,),
}
"""Words of `config.json`, and the commands that look at them."""
LARGE = {
    "of experts": ("num_experts", 10**12),
    "of layers": ("num_hidden_layers", 10**7),
    "of layers, 10**12": ("num_hidden_layers", 10**12),
    "of heads": ("num_attention_heads", 10**12),
    "of sparse steps": ("decoder_sparse_step", 10**12),
}
NO_NUMBERS = {"one in a text": "3", "true": True, "one with a point": 3.0, "below zero": -3, "an object": {"a": 3}}
"""To take these for silence would let who writes them leave out an expert, or a layer."""
TEXTS: dict[str, str | bytes] = {
    "nothing": "",
    "no JSON": "{",
    "a list": "[]",
    "a number": "7",
    "a text": '"x"',
    "null": "null",
    "NaN": "NaN",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "no UTF-8": b'{"a": "\xff"}',
    "NUL": b"{}\0",
    "deep lists": "[" * 200_000,
    "deep objects": '{"a":' * 200_000,
    "deep and closed": '{"a":' * 900 + "{}" + "}" * 900,
    "a number of 5,000 digits": '{"num_experts": ' + "9" * 5000 + "}",
    "50,000 keys": "{" + ",".join(f'"k{i}": {i}' for i in range(50_000)) + "}",
    "a key twice": '{"model_type": "qwen3_moe", "model_type": "mixtral"}',
    "comments": "{} // none",
}
QUANTIZED = {
    "blocks of a text": {"quant_method": "fp8", "weight_block_size": "xx"},
    "blocks of nothing": {"quant_method": "fp8", "weight_block_size": [0, 0]},
    "blocks below zero": {"quant_method": "fp8", "weight_block_size": [-1, -1]},
    "huge blocks": {"quant_method": "fp8", "weight_block_size": [10**30, 10**30]},
    "one block": {"quant_method": "fp8", "weight_block_size": [128]},
    "a method that is a list": {"quant_method": []},
    "modules that are a number": {"quant_method": "mxfp4", "modules_to_not_convert": 7},
    "modules that are a pattern": {"quant_method": "fp8", "ignored_layers": ["(a+)+$" * 40]},
}
LEAF = "('params', 'params', 'decoder', 'norm', 'scale')"
TREE: dict[str, Pointer] = {
    "the tree": ("tree_metadata",),
    "a leaf": ("tree_metadata", LEAF),
    "its keys": ("tree_metadata", LEAF, "key_metadata"),
    "its first key": ("tree_metadata", LEAF, "key_metadata", 0),
    "the first key's text": ("tree_metadata", LEAF, "key_metadata", 0, "key"),
    "the first key's kind": ("tree_metadata", LEAF, "key_metadata", 0, "key_type"),
    "its value": ("tree_metadata", LEAF, "value_metadata"),
    "its kind": ("tree_metadata", LEAF, "value_metadata", "value_type"),
    "what of it was written": ("tree_metadata", LEAF, "value_metadata", "write_shape"),
    "the mark of databases": ("use_ocdbt",),
    "the mark of zarr 3": ("use_zarr3",),
    "the mark of zeros": ("store_array_data_equal_to_fill_value",),
    "the second tree": ("value_metadata_tree",),
    "an option": ("ts_spec",),
}
SIDE: dict[str, tuple[str, Pointer]] = {
    "shardings": ("_sharding", ()),
    "a sharding": ("_sharding", ("cGFyYW1zLnBhcmFtcy5kZWNvZGVyLmxheWVycy5tb2VfYmxvY2sud2lfMA==",)),
    "what is kept of arrays": ("array_metadatas/process_0", ()),
    "the list of what is kept": ("array_metadatas/process_0", ("array_metadatas",)),
    "what is kept of one": ("array_metadatas/process_0", ("array_metadatas", 1)),
    "its metadata": ("array_metadatas/process_0", ("array_metadatas", 1, "array_metadata")),
    "its name": ("array_metadatas/process_0", ("array_metadatas", 1, "array_metadata", "param_name")),
    "its part": ("array_metadatas/process_0", ("array_metadatas", 1, "array_metadata", "write_shape")),
    "its chunk": ("array_metadatas/process_0", ("array_metadatas", 1, "array_metadata", "chunk_shape")),
}
SHARDINGS = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "axes of a number": '{"partition_spec": [["x"], 7], "axis_names": ["x"], "shape": [2]}',
    "axes unknown": '{"partition_spec": [["y"]], "axis_names": ["x"], "shape": [2]}',
    "no devices": '{"partition_spec": [["x"]], "axis_names": ["x"], "shape": [0]}',
    "devices of a text": '{"partition_spec": [["x"]], "axis_names": ["x"], "shape": ["2"]}',
    "too few names": '{"partition_spec": [["x"]], "axis_names": [], "shape": [2]}',
    "no names": '{"partition_spec": [["x"]]}',
    "lists in lists": '{"partition_spec": [[["x"]]], "axis_names": ["x"], "shape": [2]}',
}


ROUTER = ("num_experts_per_tok", "n_group", "topk_group", "scoring_func", "routed_scaling_factor", "swiglu_limit")
"""Words that only the probes of a verification look at; each costs seconds, because JAX compiles them."""
PROBED = "--verify {in} {other} --layers 0 --experts 0"


def variants() -> Iterator[Table]:
    """All of them, by kind."""
    configs, trees, sides = Table("config", []), Table("tree", []), Table("beside the arrays", [])
    for word, commands in WORDS.items():
        for name, value in wrong():
            configs.add(f"{word} is {name}", "hf", edit("config.json", (word,), value), *commands, slow=rare(name))
        for name, value in wrong(FEW):
            configs.add(f"{word} is {name}", "maxtext", edit("config.json", (word,), value), HF, COMPARE, slow=rare(name))
        configs.add(f"no {word}", "hf", _without(word), *commands)
    for name, (word, value) in LARGE.items():
        configs.add(f"a large number {name}", "hf", edit("config.json", (word,), value), PREFUSE, ORBAX, COMPARE)
        configs.add(f"a large number {name}", "maxtext", edit("config.json", (word,), value), HF)
    for name, value in NO_NUMBERS.items():
        for word in ("num_experts", "num_hidden_layers"):
            configs.add(f"{word} is no number but {name}", "hf", edit("config.json", (word,), value), codes=frozenset({3}))
    for name, value in QUANTIZED.items():
        configs.add(name, "hf", edit("config.json", ("quantization_config",), value), PREFUSE, DEQUANTIZE)
    for name, content in TEXTS.items():
        configs.add(f"holds {name}", "hf", text("config.json", content), PREFUSE, COMPARE)
        configs.add(f"holds {name}", "maxtext", text("config.json", content), HF, PREFUSE)
        trees.add(f"holds {name}", "dirs", text("_METADATA", content), PREFUSE, codes=frozenset({3, 4}))
        sides.add(f"shardings, {name}", "dirs", text("_sharding", content))
        sides.add(f"arrays, {name}", "dirs", text("array_metadatas/process_0", content))
    for name, pointer in TREE.items():
        for what, value in wrong():
            trees.add(f"{name} is {what}", "dirs", edit("_METADATA", pointer, value), PREFUSE, slow=rare(what))
        for what, value in wrong(FEW):
            trees.add(f"{name} is {what}", "zarr2-fused", edit("_METADATA", pointer, value), COMPARE, slow=rare(what))
    for name, (file, pointer) in SIDE.items():
        for what, value in wrong():
            sides.add(f"{name} is {what}", "dirs", edit(file, pointer, value), PREFUSE, slow=rare(what))
    for name, sharding in SHARDINGS.items():
        sides.add(f"a sharding is {name}", "dirs", edit(*SIDE["a sharding"], sharding))
    for word in ROUTER:
        for name, value in wrong(("infinity", "a text that forges", "an empty list")):
            configs.add(f"{word} is {name}, probed", "hf", edit("config.json", (word,), value), PROBED, slow=True)
    _many(trees)
    yield from (configs, trees, sides)


def _without(word: str) -> Change:
    def change(box: Sandbox) -> None:
        def dropped(tree: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in tree.items() if key != word}

        edit("config.json", (), dropped)(box)

    return change


def _many(table: Table) -> None:
    """Trees of very many leaves, or of other kinds of leaves."""

    def leaves(count: int, kind: str, depth: int = 1) -> Change:
        def grown(tree: dict[str, Any]) -> dict[str, Any]:
            value = {"value_type": kind, "skip_deserialize": False}
            keys = [[{"key": f"k{i}", "key_type": 2}] * depth for i in range(count)]
            return tree | {str(i): {"key_metadata": key, "value_metadata": value} for i, key in enumerate(keys)}

        return edit("_METADATA", ("tree_metadata",), grown)

    table.add("5,000 arrays that are not there", "dirs", leaves(5_000, "np.ndarray"), codes=frozenset({3}))
    table.add("20,000 empty containers", "dirs", leaves(20_000, "Dict"))
    table.add("a depth of 5,000", "dirs", leaves(1, "Dict", 5_000))
    table.add("a text that is not there", "dirs", leaves(1, "string"), codes=frozenset({3}))
    texts = {"a list": "[]", "a number": "7", "a wrong value": '{"k0": [1]}', "an escape": '{"k0": "\\u001b"}'}
    for name, content in texts.items():

        def change(box: Sandbox, content: str = content) -> None:
            leaves(1, "string")(box)
            place(box, "_strings.json").write_text(content)

        table.add(f"texts are {name}", "dirs", change)
    table.add("no leaf at all", "dirs", edit("_METADATA", ("tree_metadata",), {}), codes=frozenset({3, 4}))
    table.add("no tree", "dirs", edit("_METADATA", ("tree_metadata",), GONE), codes=frozenset({3, 4}))
    for key in (0, 3, 99, "2", 1.5):
        kinds: Any = [{"key": "0", "key_type": key}]
        table.add(f"a key of kind {key!r}", "dirs", edit("_METADATA", ("tree_metadata", LEAF, "key_metadata"), kinds))
    for name, text_ in (("5,000 digits", "9" * 5000), ("a word", "x"), ("below zero", "-1"), ("an escape", ESCAPED)):
        index = [{"key": text_, "key_type": 1}]
        table.add(f"an index of {name}", "dirs", edit("_METADATA", ("tree_metadata", LEAF, "key_metadata"), index))
    table.add("no keys", "dirs", edit("_METADATA", ("tree_metadata", LEAF, "key_metadata"), []), DRY, PREFUSE)
