"""The network run piece by piece: up to a place, over all probes, and from a place to the end.

Weights that do not change are constants of a piece, which ONNX Runtime lays out, and fuses with what follows:
as inputs they cost half as much time again in a ResNet-18, twice as much in an EfficientNet.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence, Set

import numpy as np

from onnxdp import arrays, runtime
from onnxdp.network import Changes, Network, types_of
from onnxdp.probes import Probes
from onnxdp.records import Array

HELD = 160_000_000
"""Bytes of the tensors alive at one place, of all probes, up to which a stream holds them."""
SHOWN = 96
"""Samples of which tensors are looked at where they are not held: so large ones have many places each."""
SECTIONS = 6
"""Pieces that the rest of a network is run in: the first takes weights as inputs, the others hold theirs."""


class Stream:
    """A run of the network over all probes, halted between two nodes; moved on piece by piece.

    Where the tensors alive are more than ``cap`` bytes they are made again, feed by feed, from those of an
    earlier place: early tensors are the large ones, and few nodes lie before them.

    Parameters
    ----------
    network : Network
    probes : Probes
    cap : int
        In bytes.
    """

    def __init__(self, network: Network, probes: Probes, cap: int = HELD) -> None:
        self._network = network
        self._given = [network.complete(feed) for feed in probes.feeds]
        self._batch = probes.batch
        self._cap = cap
        self._changes: Changes = {}
        self._restart()

    def _restart(self) -> None:
        self._place = self._start = 0  # where it is halted, and where the tensors held are alive
        self._alive: list[str] = []
        self._held: list[dict[str, Array]] = [{} for _ in self._given]
        self._ahead: Piece | None = None  # what lies between the two
        self._latest: tuple[int, Mapping[str, Array]] = (-1, {})

    @property
    def feeds(self) -> int:
        """Number of feeds that run side by side."""
        return len(self._given)

    @property
    def batch(self) -> int:
        """Samples in one feed."""
        return self._batch

    @property
    def shown(self) -> range:
        """The feeds to look at here: all, or some where each would have to be run again from far behind."""
        again = self._ahead is not None
        return range(0, self.feeds, max(1, self.feeds * self._batch // SHOWN) if again else 1)

    @property
    def place(self) -> int:
        """Where it is halted: before the node at this place."""
        return self._place

    def advance(self, place: int, changes: Changes) -> None:
        """Run to the node at ``place``, some weights on the way changed; from the start if it is past."""
        if place < self._place:
            self._restart()
        if place == self._place:
            return
        self._place, self._alive = place, self._network.alive(place)
        made = [n for n in self._alive if n not in self._held[0]]
        weights = {**self._network.fed, **changes}
        self._ahead = None
        if made:
            self._ahead = Piece(
                self._network, self._start, place, self._held[0], made, weights, weights.keys()
            )
        self._latest = (-1, {})
        if sum(a.nbytes for a in self.state(0).values()) * self.feeds > self._cap:
            return
        for number in range(self.feeds):
            self._held[number] = dict(self.state(number))
        self._start, self._ahead = place, None

    def state(self, feed: int) -> Mapping[str, Array]:
        """Return the tensors of one feed that are alive here; all of one, then all of another."""
        if self._latest[0] != feed:
            if self._ahead:
                self._latest = (-1, {})  # large: not held beside the next
                arrays.trim()
            held = self._held[feed]
            made = self._ahead.run({**self._given[feed], **held}) if self._ahead else {}
            self._latest = feed, {n: held[n] if n in held else made[n] for n in self._alive}
        return self._latest[1]

    def has(self, name: str) -> bool:
        """Whether a tensor is alive here."""
        return name in self._alive

    def tensor(self, feed: int, name: str) -> Array:
        """Return a tensor that is alive here, or an input, of one feed; float32."""
        state = self.state(feed)
        return np.asarray(state[name] if name in state else self._given[feed][name], np.float32)


class Piece:
    """A session of the nodes between two places, and the weights that it does not hold itself.

    Parameters
    ----------
    network : Network
    start, stop : int
        Places; None is the end.
    tensors : mapping of str to ndarray
        Alive at the start, for their types.
    outputs : sequence of str
    weights : mapping of str to ndarray
        For all inputs of the lifted network.
    constant : set of str
        Those of them that are known not to change.
    """

    def __init__(
        self,
        network: Network,
        start: int,
        stop: int | None,
        tensors: Mapping[str, Array],
        outputs: Sequence[str],
        weights: Changes,
        constant: Set[str],
    ) -> None:
        types = types_of({n: tensors[n] for n in network.alive(start)})
        self._outputs = list(outputs)
        self._session = network.segment(start, stop, types, outputs, {n: weights[n] for n in constant})
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._weights = {n: weights[n] for n in self._inputs if n in weights}

    def run(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Run one feed; weights among the ``tensors`` take the place of those that may change."""
        given = {n: tensors[n] if n in tensors else self._weights[n] for n in self._inputs}
        return runtime.run(self._session, given, self._outputs)


class Tail:
    """What lies between any place and the outputs, with weights of its own.

    Parameters
    ----------
    network : Network
    outputs : sequence of str
    weights : mapping of str to ndarray
        For all inputs of the lifted network.
    """

    def __init__(self, network: Network, outputs: Sequence[str], weights: Changes) -> None:
        self._network = network
        self._outputs = outputs
        self._weights = weights
        self._constant = {n for n in weights if network.readers(n) < 2}
        places = network.halts
        self._bounds = places[:: max(1, -(-len(places) // SECTIONS))][1:]
        self._pieces: dict[int, Piece | None] = {}
        self._first: tuple[int, Piece | None] = (-1, None)

    def run(self, place: int, tensors: Mapping[str, Array], changes: Changes) -> dict[str, Array]:
        """Return the outputs of one feed.

        Parameters
        ----------
        place : int
        tensors : mapping of str to ndarray
            Those alive there, and the network's inputs.
        changes : mapping of str to ndarray
            To weights that the node at ``place`` reads first.
        """
        known = {**tensors, **changes}
        if self._first[0] != place:
            self._first = place, self._piece(place, known, frozenset())
        known |= self._first[1].run(known) if self._first[1] else {}
        for bound in self._bounds[bisect_right(self._bounds, place) :]:
            if bound not in self._pieces:
                self._pieces[bound] = self._piece(bound, known, self._constant)
            piece = self._pieces[bound]
            known |= piece.run(known) if piece else {}
        return {n: known[n] for n in self._outputs}

    def _piece(self, start: int, known: Mapping[str, Array], constant: Set[str]) -> Piece | None:
        """Return the nodes up to the next bound; None where they make nothing that is read later."""
        beyond = self._bounds[bisect_right(self._bounds, start) :]
        stop = beyond[0] if beyond else None
        wanted = self._outputs if stop is None else self._network.alive(stop)
        before = set(self._network.alive(start))
        made = [n for n in wanted if n not in before]
        if not made:
            return None
        return Piece(self._network, start, stop, known, made, self._weights, constant)
