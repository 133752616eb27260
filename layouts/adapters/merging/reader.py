"""A base checkpoint whose tensors are read as if an adapter had been merged into them; all others are as they are.

In: the open base, the open adapter, and where its updates go. Out: a reader. It never writes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layouts.adapters.merging.product import add_update
from layouts.adapters.merging.sites import Cut, Site, Term, cuts
from layouts.adapters.units import read_pair
from layouts.disk.pread import Empty, Extent
from layouts.errors import PlanError
from layouts.hf import HFReader
from layouts.tensors import TensorSpec, bits, numpy_dtype
from layouts.through import Through

KEPT = 4
"""Projections of a layer whose A and B stay in memory for the next tensor."""
_Factors = tuple[NDArray[np.float32], NDArray[np.float32]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergingReader(Through):
    """See `layouts.reader.Reader`; `inner` is the base, and `sites` are the tensors that change."""

    adapter: HFReader
    sites: Mapping[str, Site]
    _kept: dict[tuple[str, ...], _Factors] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Those of the base: merging changes no name, shape or type."""
        return self.inner.tensors

    def unit(self, name: str) -> None:  # noqa: ARG002
        """Any part can be read alone."""
        return

    def extent(self, name: str) -> Extent | None:
        """None where it is computed."""
        return None if name in self.sites else self.inner.extent(name)

    def read(self, name: str, slices: tuple[slice, ...], empty: Empty = np.empty) -> NDArray[Any]:
        """A block as bits, merged; other tensors as they are stored.

        Raises:
            PlanError: a weight that was finite is not any more.
        """
        if (site := self.sites.get(name)) is None:
            return self.inner.read(name, slices, empty)
        spec = self.tensors[name]
        spans = [range(*cut.indices(size)) for cut, size in zip(slices, spec.shape, strict=True)]
        out = empty([len(span) for span in spans], bits(spec.dtype))
        out[...] = self._before(site, spec, tuple(slice(span.start, span.stop) for span in spans))
        values = out.view(numpy_dtype(spec.dtype))
        for cut in cuts(site, spans):
            if not self._merged(site.terms[cut.g], cut, values):
                raise PlanError(
                    f"{self.path}: {name} (in {self.where(name)}): with the adapter some weights are beyond what {spec.dtype} "
                    "holds; is it an adapter of this model?"
                )
        return out

    def _before(self, site: Site, spec: TensorSpec, slices: tuple[slice, ...]) -> NDArray[Any]:
        """The base's weights, or the whole tensor that the adapter has in their place."""
        if site.instead is None:
            return self.inner.read(site.name, slices)
        found = self.adapter.read(site.instead, slices)
        have, wanted = (numpy_dtype(code) for code in (self.adapter.tensors[site.instead].dtype, spec.dtype))
        with np.errstate(over="ignore"):
            return found if have == wanted else found.view(have).astype(wanted).view(bits(spec.dtype))

    def _merged(self, term: Term, cut: Cut, values: NDArray[Any]) -> bool:
        a, b = self._factors(term)
        rows = b[cut.expert][:, term.first + term.step * cut.o]
        return add_update(values[cut.window], a[cut.expert][:, cut.i], rows, term.unit.scales[cut.expert].factor, cut.dims)

    def _factors(self, term: Term) -> _Factors:
        """A (e, r, i) and B (e, r, o) of all experts in float32."""
        key = (*term.unit.names[0], *term.unit.names[1])
        with self._lock:
            if key in self._kept:
                return self._kept[key]
            pair = read_pair(self.adapter, term.form, term.unit)
            a, b = (
                each.view(numpy_dtype(term.unit.dtypes[side])).astype(np.float32)
                for side, each in (("A", pair.a), ("B", pair.b))
            )
            while len(self._kept) >= KEPT:
                self._kept.pop(next(iter(self._kept)))
            found = np.ascontiguousarray(a), np.ascontiguousarray(b.swapaxes(1, 2))
            self._kept[key] = found
            return found

    def close(self) -> None:
        """Let go of both."""
        self.inner.close()
        self.adapter.close()


def held(sites: Mapping[str, Site]) -> tuple[int, int]:
    """Bytes that are held besides: at any rate, and by each worker."""
    largest = max((term.nbytes for site in sites.values() for term in site.terms.values()), default=0)
    return (KEPT + 3) * largest, 2 * largest
