"""Values that MaxText has others of, on the way back from memory: as they were in the checkpoint, or computed.

In: a tree, the plan by which it was loaded, the checkpoint. Out: the plan of saving it, and what that reads. It never writes.

As of a conversion: what the rule makes, to the bit, of what the checkpoint has, or of the originals that it keeps, becomes that
again. If one of these values is another, all are computed, and a tree gets the new originals.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from convert.engine.budget import STRIP
from convert.engine.copying import Worker
from convert.engine.regions import fill
from convert.engine.twins import check_exact, with_computed
from convert.pipeline.back import TreeReader
from convert.planning.across.computed import computed_back
from convert.planning.forms import Targets
from convert.planning.planner import Plan, verbatim
from convert.planning.targets import Target
from layouts.computing import OriginalsReader, Values, computing
from layouts.language.pattern import strips
from layouts.reader import Reader, ReadLimits, is_chunked
from layouts.side_files import ORIGINALS
from layouts.tensors import bits, itemsize
from layouts.windows import Windows

_READ, _HELD = ReadLimits(cache=16 << 20, stream=16 << 20, streams=1), 64 << 20
"""What reading the checkpoint's arrays may hold, and the bytes that this is together."""


def with_values(plan: Plan, forward: Plan, tree: TreeReader, like: Reader) -> tuple[Plan, Reader, int]:
    """`plan` makes `like` of the tree, which `forward` made of it; both as they are where nothing is computed.

    Besides, the bytes that reading holds, of which nobody else knows.

    Raises:
        InputError: originals of `like` are not what was written.
    """
    if forward.exact:
        values = _exact(forward, like)
        plan = replace(plan, values=values)
        reader = computing(tree, values)
        check_exact(plan, reader)
        return plan, reader, 0
    if not forward.values.factors:
        return plan, tree, 0
    computed = [target for target in forward.targets if target.first_source in forward.values.factors]
    with ExitStack() as until:
        _, source = with_computed(forward, like)
        if isinstance(source, OriginalsReader):
            until.callback(source.kept.close)
        like.hold(_READ, Windows())
        worker = Worker.make(source, STRIP)
        changed = next((target.spec.name for target in computed if not _same(target, tree, worker)), None)
    if changed is None:
        specs = {name: like.tensors[name] for name in forward.values.factors}
        targets = (verbatim(each.spec) if each.spec.name in specs else each for each in plan.targets)
        said = f"values are not computed: those of {', '.join(forward.computed_kinds)} are what they were"
        plan = replace(plan, targets=Targets(targets), remarks=(*plan.remarks, said))
        return plan, replace(tree, tensors={**tree.tensors, **specs}), _HELD if is_chunked(like) else 0
    plan = computed_back(plan, forward, computed)
    files = {name: nbytes for name, nbytes in plan.side_files.items() if name != ORIGINALS}
    said = f"values are computed, and bits may not be those of {like.path}: {changed} was changed since it was loaded"
    return replace(plan, side_files=files, remarks=(*plan.remarks, said)), computing(tree, plan.values), 0


def _exact(forward: Plan, like: Reader) -> Values:
    """What makes types as they were of what loading gave, and ones that `like` has, or says which are to be ones."""
    types, ones = forward.values.types, forward.values.ones
    sources = {target.spec.name: target.first_source for target in forward.targets}
    made = {target.spec.name: target.spec for target in forward.targets if target.first_source in ones}
    return Values(
        types={name: like.tensors[source].dtype for name, source in sources.items() if source in types},
        ones=made or ones,
    )


def _same(target: Target, tree: TreeReader, worker: Worker) -> bool:
    """Whether a leaf holds what loading it gives."""
    spec = target.spec
    for part in strips(spec.shape, max(1, STRIP // itemsize(spec.dtype))):
        found = np.empty([cut.stop - cut.start for cut in part], bits(spec.dtype))
        fill(target, part, found, worker, lambda _: None)
        if not np.array_equal(found, tree.read(spec.name, part)):
            return False
    return True
