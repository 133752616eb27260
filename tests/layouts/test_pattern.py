"""The language of the tables: templates and patterns are exact inverses, and any two layouts convert into one another."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.planning.relay import landing
from layouts.language.layout import layouts
from layouts.language.pattern import Pattern, strips
from layouts.language.template import Template
from layouts.matching.group import Group
from layouts.tables.natives import PER_EXPERT, SOURCES
from layouts.tables.targets import TARGETS
from layouts.tensors import DTYPES, bits, itemsize, numpy_dtype
from tests.tiny import AXES, MemoryReader, fill, same, store

WORDS = st.text("abwx_-0129", min_size=1, max_size=4)
NUMBERS = st.integers(0, 999_999_999)


@st.composite
def templates(draw):
    """A template in the style of the tables, and an index for it."""
    text, index = draw(WORDS), {}
    if draw(st.booleans()):
        text, index["path"] = "{path}", draw(st.text(min_size=1, max_size=9))
    for slot in draw(st.lists(st.sampled_from("elgst"), unique=True)):
        text += "." + "".join(draw(st.lists(WORDS.map(lambda word: word + "."), max_size=2)))
        if draw(st.booleans()):
            choices = draw(st.lists(WORDS, min_size=2, max_size=3, unique=True))
            text += f"{{{slot}:{','.join(choices)}}}"
            index[slot] = draw(st.integers(0, len(choices) - 1))
        elif draw(st.booleans()):
            factor = draw(st.integers(2, 9))
            inner = draw(st.sampled_from([None, slot.translate(str.maketrans("elgst", "vwxyz"))]))
            offset = draw(st.integers(0, factor - 1))
            text += f"{{{slot}*{factor}{f'+{inner or offset}' if inner or offset else ''}}}"
            index[slot] = draw(st.integers(0, 99_999_999))
            index |= {inner: offset} if inner else {}
        else:
            text += f"{{{slot}}}"
            index[slot] = draw(NUMBERS)
    return Template(text + draw(st.sampled_from(["", ".weight", ".(.*)+"]))), index


@given(templates())
def test_a_name_parses_to_the_index_that_rendered_it(case):
    template, index = case
    assert set(template.slots) == set(index)
    assert template.parse(template.render({**index, "unused": 1})) == index


@given(templates(), st.data())
def test_a_name_that_parses_is_rendered_again_to_the_letter(case, data):
    template, index = case
    name = template.render(index)
    at = data.draw(st.integers(0, len(name)))
    other = (
        name[:at] + data.draw(st.sampled_from(["", "0", "7", ".", "a", "\n", "٣"])) + name[at + data.draw(st.integers(0, 1)) :]
    )
    parsed = template.parse(other)
    assert parsed is None or template.render(parsed) == other


EXPERT = Template("model.layers.{l}.mlp.experts.{e}.{g:gate_proj,up_proj}.weight")


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.0.mlp.experts.10.up_proj.weight", {"l": 0, "e": 10, "g": 1}),
        ("model.layers.07.mlp.experts.1.up_proj.weight", None),
        ("model.layers.7.mlp.experts.01.up_proj.weight", None),
        ("model.layers.7.mlp.experts.-1.up_proj.weight", None),
        ("model.layers.7.mlp.experts.٣.up_proj.weight", None),
        ("model.layers.7.mlp.experts.1.up_proj.weight\n", None),
        ("xmodel.layers.7.mlp.experts.1.up_proj.weight", None),
        ("model.layers.7.mlp.experts.1.up_proj.weight_scale", None),
        ("model.layers.7.mlp.experts.1.down_proj.weight", None),
        ("modelxlayers.7.mlp.experts.1.up_proj.weight", None),
        (f"model.layers.7.mlp.experts.{'9' * 5000}.up_proj.weight", None),
    ],
)
def test_names_match_in_full_and_indices_have_one_spelling(name, index):
    assert EXPERT.parse(name) == index


@pytest.mark.parametrize(
    ("name", "index"),
    [("a.6", {"l": 1, "p": 2}), ("a.3", {"l": 0, "p": 3}), ("a.0", {"l": 0, "p": 0}), ("a.03", None)],
)
def test_one_number_may_hold_two_axes(name, index):
    template = Template("a.{l*4+p}")
    assert template.slots == ("l", "p")
    assert template.parse(name) == index
    assert index is None or template.render(index) == name


def test_the_second_axis_of_a_number_ends_before_the_first_counts_on():
    with pytest.raises(ValueError, match="p = 4 is not below 4"):
        Template("a.{l*4+p}").render({"l": 0, "p": 4})


@pytest.mark.parametrize(
    "text", ["{e}.{e}", "{l+p}", "{l*4+l}", "a{g:x}", "a{g:x,x}", "{e}{l}", "a.{e", "a.{E}", "a.}", "{g:}", "{}"]
)
def test_misspelt_templates_are_refused(text):
    with pytest.raises(ValueError, match=re.escape(text)):
        Template(text)


@pytest.mark.parametrize(
    ("text", "fixed", "spans"),
    [
        ("m.{l}.{e}.{g:gate,up}.w", {"l": 3}, {"e": range(3), "g": range(2)}),
        ("m.{l}.{e}.{g:gate,up}.w", {}, {"g": range(2), "l": range(2, 4), "e": range(9, 12)}),
        ("{path}.{l}.{e}", {"path": "a{0}{}.{g}", "l": 0, "g": 1}, {"e": range(2)}),
        ("m.{l*4+1}.{e}", {}, {"l": range(2), "e": range(2)}),
        ("m.{l*4+p}.{e}", {"l": 2}, {"p": range(4), "e": range(2)}),
        ("m.{l}", {"l": 7}, {"e": range(2)}),
        ("m.{l}", {"l": 7}, {}),
    ],
)
def test_names_of_a_grid_are_those_that_each_point_renders(text, fixed, spans):
    points = [dict(zip(spans, point, strict=True)) for point in itertools.product(*spans.values())]
    assert list(Template(text).names(fixed, spans)) == [Template(text).render({**fixed, **point}) for point in points]


def test_names_of_a_literal_template_keep_its_braces():
    assert list(Template("a{e}{0}", literal=True).names({"e": 1}, {})) == ["a{e}{0}"]


@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 0), (4, 3), (2, 3, 4)])
@pytest.mark.parametrize("limit", [1, 3, 12, 24, 100])
def test_strips_cover_a_tensor_in_order_each_within_the_limit(shape, limit):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    found = [array[part] for part in strips(shape, limit)]
    assert [each for part in found for each in part.ravel()] == array.ravel().tolist()
    assert all(part.size <= limit for part in found)


def test_rendering_needs_every_slot():
    with pytest.raises(KeyError):
        EXPERT.render({"l": 1, "e": 2})


def test_a_literal_template_is_one_name_whatever_its_letters():
    weird = Template("a{e}{e}.{g:x}*", literal=True)
    assert weird.slots == ()
    assert weird.render({"e": 1}) == weird.text
    assert weird.parse(weird.text) == {}
    assert weird.parse("a11.x*") is None


@st.composite
def patterns(draw):
    """A pattern over some axes in some order and grouping, with sizes."""
    axes = draw(st.lists(st.sampled_from("abcdef"), unique=True, max_size=5))
    text, left = [], list(axes)
    while left:
        group, left = left[: (count := draw(st.integers(1, 3)))], left[count:]
        text.append(f"({' '.join(group)})" if len(group) > 1 or draw(st.booleans()) else group[0])
    return Pattern(" ".join(text)), {axis: draw(st.integers(1, 4)) for axis in axes}


@given(patterns(), st.data())
def test_sizes_and_shape_are_inverse(case, data):
    pattern, sizes = case
    known = dict(sizes)
    for group in pattern.groups:
        known.pop(data.draw(st.sampled_from([*group, None])), None)
    shape = pattern.shape(sizes)
    assert pattern.sizes(shape, known) == sizes
    assert np.prod(shape) == np.prod(pattern.split(sizes))
    for other in {(*shape, 1), shape[:-1]} - {shape}:
        with pytest.raises(ValueError, match="shape"):
            pattern.sizes(other, known)


@pytest.mark.parametrize(
    ("text", "shape", "known"),
    [("e k (g n)", (2, 3, 5), {"g": 2}), ("(g n)", (4,), {}), ("(g n)", (0,), {"g": 0}), ("e k", (2, 3), {"e": 3})],
)
def test_a_shape_that_does_not_fit_is_refused(text, shape, known):
    with pytest.raises(ValueError, match=re.escape(text)):
        Pattern(text).sizes(shape, known)


@pytest.mark.parametrize("text", ["a a", "a (b", "(a (b))", "()", "a-b", "(... a)", "... ...", "e" * 60 + "!"])
def test_misspelt_patterns_are_refused(text):
    with pytest.raises(ValueError, match="axis"):
        Pattern(text)


def test_dots_stand_for_the_axes_that_come_along():
    pattern = Pattern("e ... k (g n)")
    assert [len(pattern.expand(rank).groups) for rank in (3, 4, 6)] == [3, 4, 6]
    assert pattern.expand(5).axes[0] == "e"
    assert pattern.expand(5).axes[-3:] == ("k", "g", "n")
    with pytest.raises(ValueError, match="rank 2"):
        pattern.expand(2)


@given(patterns(), st.data())
def test_a_window_shows_exactly_the_box(case, data):
    pattern, sizes = case
    array = np.arange(np.prod(pattern.shape(sizes), dtype=int)).reshape(pattern.shape(sizes))
    box = {}
    for axis in pattern.axes:
        start = data.draw(st.integers(0, sizes[axis] - 1))
        box[axis] = range(start, data.draw(st.integers(start + 1, sizes[axis])))
    window = pattern.window(sizes, box)
    wanted = array.reshape(pattern.split(sizes))[tuple(slice(span.start, span.stop) for span in box.values())]
    block = array[window.slices].reshape(window.shape)[window.inside]
    assert np.array_equal(block, wanted)
    assert pattern.window(sizes, pattern.whole(sizes)).slices == tuple(slice(0, size) for size in array.shape)


@given(patterns(), st.integers(1, 200))
def test_strips_cover_a_tensor_once_in_storage_order(case, limit):
    pattern, sizes = case
    flat = np.arange(np.prod(pattern.shape(sizes), dtype=int)).reshape(pattern.split(sizes))
    strips = [
        flat[tuple(slice(box[a].start, box[a].stop) for a in pattern.axes)].ravel() for box in pattern.strips(sizes, limit)
    ]
    assert np.array_equal(np.concatenate(strips), flat.ravel())
    assert max(map(len, strips)) <= limit


NAMES = ("per-expert", "per-expert-w123", "stacked", "stacked-flat", "fused-interleaved", "maxtext", "concat", "transformers")
LAYOUTS = {name: {**SOURCES, **TARGETS}[name] for name in NAMES}
"""Those that einops can write down; tests/layouts has the cut, padded and reversed ones."""
PAIRS = list(itertools.permutations(LAYOUTS, 2))
CODES = ("BF16", "F8_E4M3", "F8_E5M2", "I8", "F16", "F32", "F64")
NASTY = np.array([0x7F, 0xFF, 0x80, 0x00, 0x01, 0xC0, 0xF8], "u1")


@st.composite
def weights(draw, scan):
    """Bit patterns, half of their bytes such as make NaNs with payloads, infinities, negative zeros and denormals."""
    e, n = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    k = draw(st.sampled_from([n, 2 * n, draw(st.integers(1, 7))]))
    code = draw(st.sampled_from(CODES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    found = {}
    for role, shape in {"wi": (e, *scan, k, 2, n), "wo": (e, *scan, n, k)}.items():
        raw = rng.integers(0, 256, (*shape, itemsize(code)), dtype="u1")
        raw = np.where(rng.random(raw.shape) < 0.5, NASTY[raw % len(NASTY)], raw)
        found[role] = raw.view(bits(code))[..., 0]
    return code, found


def convert_block(arrays, code, logical, source, wanted, limit):
    """Through the planner's targets and the block copy, as a run does it."""
    reader, found = MemoryReader(arrays, code), {}
    for role, array in logical.items():
        placed = source[role].place("x.{l}.experts")
        scan = array.shape[1 : 1 + array.ndim - len(AXES[role])]
        sizes = dict(zip(AXES[role], (array.shape[0], *array.shape[1 + len(scan) :]), strict=True))
        names = tuple(name for name in arrays if placed.key.parse(name) is not None)
        pattern = placed.pattern.expand(arrays[names[0]].ndim)
        extra = [axis for axis in pattern.axes if axis not in AXES[role]]
        group = Group(
            role=role,
            part="",
            dims="out in",
            placed=type(placed)(placed.key.bind("part", 0), pattern),
            index={"l": 3},
            sizes=sizes | dict(zip(extra, scan, strict=True)),
            dtype=code,
            names=names,
            layout=source[role],
            native=source[role],
            relaid=False,
        )
        made = landing(reader, group, [group], wanted[role], "x.{l}.experts").targets()
        found |= {target.spec.name: fill(target, reader, limit) for target in made}
    return found


@pytest.mark.parametrize("pair", PAIRS, ids=" to ".join)
@settings(max_examples=8)
@given(st.data())
def test_any_layout_becomes_any_other_and_back(pair, data):
    one, other = (LAYOUTS[name] for name in pair)
    scanned = all("..." in row.pattern for table in (one, other) for row in table.values())
    scan = data.draw(st.sampled_from([(), (2,), (3, 1)])) if scanned else ()
    code, logical = data.draw(weights(scan))
    limit, slab = data.draw(st.sampled_from([1, 7, 10_000])), data.draw(st.sampled_from([1, 40, 1 << 25]))
    before, after = (store(table, "x.{l}.experts", {"l": 3}, logical) for table in (one, other))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("convert.engine.blocks.SLAB", slab)
        assert same(convert_block(before, code, logical, one, other, limit), after)
        assert same(convert_block(after, code, logical, other, one, limit), before)


@pytest.mark.parametrize(("k", "n"), [(96, 48), (130, 130), (257, 33)])
@pytest.mark.parametrize("code", ["F8_E4M3", "BF16", "F64"])
def test_blocks_too_large_for_a_plain_copy_are_transposed_right(code, k, n):
    rng = np.random.default_rng(0)
    shapes = {"wi": (2, k, 2, n), "wo": (2, n, k)}
    logical = {role: rng.integers(0, 1 << 8, s, dtype="u1").astype(bits(code)) for role, s in shapes.items()}
    before, after = (store(table, "x.{l}.experts", {"l": 3}, logical) for table in (PER_EXPERT, TARGETS["concat"]))
    for limit in (10**9, 5000):
        assert same(convert_block(before, code, logical, PER_EXPERT, TARGETS["concat"], limit), after)


@pytest.mark.parametrize("code", DTYPES)
def test_every_element_type_has_the_size_of_its_numpy_type(code):
    assert itemsize(code) == numpy_dtype(code).itemsize == bits(code).itemsize


@pytest.mark.parametrize(
    ("wi", "wo"),
    [
        (("{experts}.wi", "e k n"), ("{experts}.wo", "e n k")),
        (("{experts}.wi", "e k (g n)"), ("{experts}.{e}.wo", "e n k")),
        (("{experts}.wi", "e k (g n)"), ("{experts}.wo", "e n k j")),
    ],
)
def test_a_row_that_holds_an_axis_twice_or_not_at_all_is_refused(wi, wo):
    with pytest.raises(ValueError, match="once"):
        layouts(wi=wi, wo=wo)
