"""What changed weights do to the network's outputs, measured on probes that no weight was fitted on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxdp import decisions
from onnxdp.answers import finite
from onnxdp.network import Changes, Network, before_softmax
from onnxdp.pieces import Stream, Tail
from onnxdp.probes import Probes
from onnxdp.records import Array

_ROUNDING = 64 * float(np.finfo(np.float32).eps)
"""Relative error that is no damage: pieces round otherwise than the whole."""


class Meter:
    """Measures what changed weights do to the network's outputs on held-out probes.

    The outputs are looked at before a closing Softmax; what all samples have in common does not count as
    signal (prototype.md section 4: normalised by the variance between pictures).
    """

    def __init__(self, network: Network, probes: Probes) -> None:
        self.network = network
        self._probes = probes = replace(probes, feeds=tuple(map(network.complete, probes.feeds)))
        self._halts = network.halts
        outputs = (*before_softmax(network.proto.graph), *network.outputs)
        names = list(dict.fromkeys((*outputs, *network.decisions.names)))
        self._session = network.session(names)
        found = network.decisions
        if found.outputs:
            first = network.run(self._session, probes.feeds[0], names, {})
            found = decisions.few(found, first, len(probes.feeds))
            names = [n for n in names if n in (*outputs, *found.names)]
        self._base = [network.run(self._session, f, names, {}) for f in probes.feeds]
        instead = {n: decisions.replaced(n, found, self._base) for n in outputs}
        self.watched, self._judged = (
            list(dict.fromkeys(t for n in some for t in instead[n]))
            for some in (before_softmax(network.proto.graph), network.outputs)
        )
        self._all = [n for n in names if n in (*self.watched, *self._judged)]
        self._base = [{n: b[n] for n in self._all} for b in self._base]
        self._power = {n: _variance(list(self._known(n)), probes) for n in self._floating()}
        self._size = {n: float(sum(np.square(b).sum() for b in self._known(n))) for n in self._floating()}
        self.rest()

    def rest(self) -> None:
        """Let go of tensors and sessions; what is asked next makes them again."""
        self._stream = Stream(self.network, self._probes)
        self._tail = Tail(self.network, self.watched, self.network.fed)

    @property
    def spread(self) -> float:
        """Deviation of the watched outputs between samples over their size; the largest of all."""
        shares = [self._power[n] / (self._size[n] or 1.0) for n in self.watched if n in self._power]
        return float(max(shares, default=1.0) ** 0.5)

    def together(self, changes: Changes) -> tuple[float, float]:
        """Return (damage, relative output error) of all changes at once.

        Damage is the squared error of the watched outputs over their variance between samples, the mean of
        all outputs; the relative error is ``||z - z'|| / ||z||``, the largest of all outputs as they are.
        """
        return self._compare(
            self.network.run(self._session, f, self._all, changes) for f in self._probes.feeds
        )

    def alone(self, weight: str, changes: Changes) -> float:
        """Return the damage of changes to one weight, running only what comes after it."""
        return self._changed_at(self._stream, self._tail, {}, weight, changes)

    def undone(self, groups: Sequence[Sequence[str]], changes: Changes) -> list[float]:
        """Return the damage of all changes but those to one group of inputs, for each group in turn.

        A group starts with a weight: only what comes after the first node that reads it is run again.
        """
        stream = Stream(self.network, self._probes)
        tail = Tail(self.network, self.watched, {**self.network.fed, **changes})
        order = sorted(range(len(groups)), key=lambda k: self.network.position(groups[k][0]))
        found = [0.0] * len(groups)
        for k in order:
            without = {n: self.network.fed[n] for n in groups[k] if n in changes}
            found[k] = self._changed_at(stream, tail, changes, groups[k][0], without)
        return found

    def _changed_at(
        self, stream: Stream, tail: Tail, before: Changes, weight: str, changes: Changes
    ) -> float:
        """Return the damage of a tail's weights with changes to one of them, those before it as given."""
        place = self.network.position(weight)
        self._bring(stream, place, before)
        got = (
            tail.run(place, {**feed, **stream.state(number)}, changes)
            for number, feed in enumerate(self._probes.feeds)
        )
        return self._compare(got)[0]

    def _bring(self, stream: Stream, place: int, before: Changes) -> None:
        """Move a stream on, halted at every weight: its rounding must not tell what was asked before."""
        done = stream.place if stream.place <= place else -1
        for halt in self._halts[bisect_right(self._halts, done) : bisect_right(self._halts, place)]:
            stream.advance(halt, before)

    def _known(self, name: str) -> Iterator[Array]:
        """Give an output of the original, feed by feed: twice as large as it is kept."""
        return (finite(b[name]) for b in self._base)

    def _floating(self) -> Iterator[str]:
        for name in self._all:
            if decisions.is_floating(self._base[0][name]) and self._base[0][name].size:
                yield name

    def _compare(self, got: Iterable[Mapping[str, Array]]) -> tuple[float, float]:
        apart: dict[str, float] = {}
        for outputs, base in zip(got, self._base, strict=True):
            for name in self._floating():
                if name in outputs:
                    apart[name] = apart.get(name, 0.0) + _squares(finite(outputs[name]), finite(base[name]))
        damages, errors = [0.0], [0.0]
        for name, lost in apart.items():
            if name in self.watched:
                told = lost if lost > _ROUNDING**2 * self._size[name] else 0.0
                damages.append(told / (self._power[name] or self._size[name] or 1.0))
            if name in self._judged:
                errors.append((lost / (self._size[name] or 1.0)) ** 0.5)
        return sum(damages) / max(1, len(damages) - 1), max(errors)


def _squares(a: Array, b: Array) -> float:
    """Sum the squared differences; outputs of different shapes (which values may decide) count whole."""
    if a.shape != b.shape:
        return float(np.square(b).sum() + np.square(a).sum())
    return float(np.square(a - b).sum())


def _variance(outputs: Sequence[Array], probes: Probes) -> float:
    """Sum of squares about the mean over samples; of the whole where there is one sample only."""
    if len({a.shape for a in outputs}) > 1:
        return float(sum(np.square(a).sum() for a in outputs))
    size = len(outputs) * outputs[0].size
    rows = np.stack(outputs).reshape(probes.samples if size % probes.samples == 0 else 1, -1)
    if len(rows) < 2:
        return float(np.square(rows).sum())
    return float(np.square(rows - rows.mean(axis=0)).sum())
