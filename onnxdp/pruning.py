"""Choose the channels that a network can do without, and let what reads them make up for them.

At a few prices, what goes is found on the original's activations, for every weight alone. What the readers of
the chosen channels become is then fitted once more, one after the other, on what the network without the
channels feeds them, so that later ones repair what earlier ones lost:

    W'_K = W_K + (H'_KK + delta I)^-1 E[x'_K (x^T W - x'^T_K W_K)],    b' = b + E[x]^T W - E[x']^T W'.

References
----------
X. Ruan et al., "EDP", 2020: pruning and merging; here after training, without labels (method.md section 3).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

from onnxdp import arrays, stats, weights
from onnxdp.channels import Chain
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.probes import Probes
from onnxdp.records import Array
from onnxdp.settings import Progress
from onnxdp.surgeon import Patient, eliminate
from onnxdp.weights import MIN_BYTES, Found

LEVELS = (1e-3, 3e-3, 0.006, 0.01, 0.018, 0.03, 0.055, 0.1, 0.18, 0.3)
"""Relative losses of what channels feed, for all of a model's numbers, at which channels go."""
DEAD = 1e-10
"""Share of what its readers give below which a channel is dead ..."""
APART = (1e4, 0.1)
"""... unless beyond it, up to so many times as much, there are so many others for each: those that happen to
be silent on made-up pictures do not stand apart (EfficientNet-Lite0: 271 dead ones, 105 beyond; losing them
costs a tenth of the logits' energy on real pictures; ResNet-20 and 56: 13 and 52, none beyond, nothing)."""
LIKELY = 100.0
"""Times as much on one feed alone as makes it worth while to look at the others."""
ENOUGH = 96
"""Samples on which channels that are dead show it."""
DAMPING = (0.01, 0.1)
"""delta over the mean diagonal of H: a + b * inputs / rows; made-up probes are not real inputs."""
MOST_INPUTS = 6144
"""Rows of a weight from which its second moment is too large to be formed."""
LEAST = 8
"""A chain keeps at least one channel in so many."""
ALIGNED = 4
"""Where nobody asks, it keeps a multiple of so many, if it had one: ONNX Runtime's blocked layout takes no
others, and a ResNet-20 without its 13 dead channels, 14, 31 or 61 left, ran 1.2 times as long."""

log = logging.getLogger(__name__)

Dropped: TypeAlias = Mapping[str, Sequence[int]]
"""Name of the weight that makes them -> channels that go, rising."""


@dataclass(slots=True)
class Fit:
    """What weights become without some channels (in their full shape), and what their outputs gain."""

    dropped: dict[str, tuple[int, ...]]
    loss: float = 0.0
    """Sum of what the readers lose, relative to what each gives."""
    tensors: dict[str, Array] = field(default_factory=dict)
    shifts: dict[str, Array] = field(default_factory=dict)

    def changes(self, network: Network, found: Found) -> dict[str, Array]:
        """Return what the lifted network is fed."""
        fed: dict[str, Array] = {n: t.astype(network.fed[n].dtype) for n, t in self.tensors.items()}
        for name, shift in self.shifts.items():
            fed.update(stats.shifted_bias(network, found, name, shift))
        return fed


class Pruner:
    """One network, and the chains of it that can be fitted again.

    Parameters
    ----------
    network : Network
    found : Found
    probes : Probes
        Those that weights are fitted on.
    chains : sequence of Chain
    seed : int
        Of the choice of rows.
    progress : callable
    """

    def __init__(
        self,
        network: Network,
        found: Found,
        probes: Probes,
        chains: Sequence[Chain],
        *,
        seed: int,
        progress: Progress,
    ) -> None:
        self._network = network
        self._found = found
        self._probes = probes
        self._seed = seed
        self._progress = progress
        self._weights = {w.name: w for w in found.weights}
        self._coarse: dict[str, float] = {}
        self._dead: Dropped | None = None
        self._means: dict[str, Array] = {}  # of what readers of Convs are fed, as dead() saw it
        self.chains = tuple(c for c in chains if all(self._usable(n) for n in _ends([c])))

    def candidates(self, levels: Sequence[float] = LEVELS) -> list[Fit]:
        """Return what goes at each level, readers fitted on the original's own activations."""
        fits = [Fit({}) for _ in levels]
        stream = Stream(self._network, self._probes)
        clusters = _clusters(self.chains)
        seen: dict[str, tuple[Array, Array, float]] = {}
        every = sorted(_ends(self.chains), key=self._place)
        for done, name in enumerate(every):
            self._progress("weighing channels", done, len(every), name)
            seen[name] = self._moment(stream, name)
            for cluster in [c for c in clusters if seen.keys() >= _ends(c)]:
                clusters.remove(cluster)
                self._eliminate(cluster, {n: seen.pop(n) for n in sorted(_ends(cluster))}, levels, fits)
        return fits

    def dead(self) -> Dropped:
        """Return the channels that give their readers nothing, where these are a kind of their own."""
        if self._dead is None:
            count = -(-ENOUGH // self._probes.batch)
            few = self._probes.feeds[:count] if self._probes.samples >= ENOUGH else ()
            # Most networks have none, and one feed says so.
            shares = self._shares(few[:1])
            if any((m <= LIKELY * DEAD).any() for m in shares.values()):
                shares = self._shares(few)
            self._dead = self._alone(shares)
        return self._dead

    def _shares(self, feeds: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
        """Return what each channel gives to what its readers give, the largest share; of chains of Convs.

        What the units of an MLP answer to, probes may lack: only channels of a Conv are said to be dead.
        """
        if not feeds:
            return {}
        probes = replace(self._probes, feeds=tuple(feeds), samples=len(feeds) * self._probes.batch)
        stream = Stream(self._network, probes)
        convs = [c for c in self.chains if self._weights[c.weight].op == "Conv"]
        gives: dict[str, Array] = {}
        every = sorted(_ends(convs), key=self._place)
        for done, name in enumerate(every):
            self._progress("looking for dead channels", done, len(every), name)
            rows, self._means[name] = self._rows(stream, name)
            w = self._matrix(name)
            whole = float(np.square(rows @ w).sum(dtype=np.float64))
            each = np.square(rows).sum(axis=0, dtype=np.float64) * np.square(w).sum(axis=1, dtype=np.float64)
            gives[name] = np.append(each / (whole or 1.0), 0.0)  # place -1: no row
        most: dict[str, Array] = {}
        for chain in convs:
            shares = [gives[n][self._seats([chain], n)].sum(axis=1) for n in _ends([chain])]
            most[chain.weight] = np.max(shares, axis=0)
        return most

    def _alone(self, shares: Mapping[str, Array]) -> Dropped:
        """Return the channels that are dead by their shares, unless others are nearly so."""
        found = {n: np.flatnonzero(m <= DEAD) for n, m in shares.items()}
        silent = sum(map(len, found.values()))
        if sum(int((m <= APART[0] * DEAD).sum()) for m in shares.values()) > (1 + APART[1]) * silent:
            return {}
        known = {c.weight: c for c in self.chains}
        gone = {n: _aligned(known[n], channels[: self.most(known[n])]) for n, channels in found.items()}
        return {n: channels for n, channels in gone.items() if channels}

    def fitted(self, dropped: Dropped) -> Fit:
        """Return the network without some channels, readers fitted one after the other.

        Readers of dead ones stay: they lose but a constant, which their biases take up.
        """
        fit = Fit({n: tuple(c) for n, c in dropped.items() if len(c)})
        gone = self._rows_gone(fit.dropped)
        if fit.dropped == self.dead():
            for name, rows in gone.items():
                w = self._matrix(name).astype(np.float32)
                if self._centred(name):
                    shift = self._means[name][rows] @ w[rows].astype(np.float64)
                    fit.shifts[name] = shift.astype(np.float32)
                w[rows] = 0
                fit.tensors[name] = weights.unblocks(self._weights[name], w[None])
            return fit
        original, pruned = Stream(self._network, self._probes), Stream(self._network, self._probes)
        changes: dict[str, Array] = {}
        for done, name in enumerate(sorted(gone, key=self._place)):
            self._progress("merging channels", done, len(gone), name)
            place = self._place(name)
            original.advance(place, {})
            pruned.advance(place, changes)
            one = Fit({})
            one.tensors[name], shift = self._refit(name, original, pruned, gone[name])
            if self._centred(name):
                one.shifts[name] = shift
            changes.update(one.changes(self._network, self._found))
            fit.tensors |= one.tensors
            fit.shifts |= one.shifts
        return fit

    def coarseness(self) -> float:
        """Return the relative losses of rounding, as :attr:`Patient.coarse`, in sum over all readers.

        Bits are shared out at best among the readers: each number is worth the same at the margin.
        """
        sizes = np.array([self._weights[n].size for n in self._coarse], float)
        shares = sizes / sizes.sum()
        losses = np.array(list(self._coarse.values())) / shares
        return float(np.exp(shares @ np.log(np.maximum(losses, 1e-12))))

    def share(self, dropped: Dropped) -> float:
        """Return the share of the weights' numbers that go."""
        before = sum(w.size for w in self._weights.values())
        left: dict[str, dict[int, int]] = {}
        for chain in self.chains:
            for cut in chain.cuts:
                name = cut.node.inputs[cut.index].name or ""  # type: ignore[union-attr]  # a cut has its tensor
                if name in self._weights:
                    axes = left.setdefault(name, {})
                    axes[cut.axis] = axes.get(cut.axis, 0) + cut.span.repeat * len(
                        dropped.get(chain.weight, ())
                    )
        gone = 0
        for name, axes in left.items():
            shape = self._weights[name].shape
            after = [d - axes.get(a, 0) for a, d in enumerate(shape)]
            gone += self._weights[name].size - int(np.prod(after, dtype=np.int64))
        return gone / before

    def _usable(self, name: str) -> bool:
        weight = self._weights[name]
        tap = stats.single_tap(self._found, weight)
        return name in self._network.fed and tap is not None and weight.inputs <= MOST_INPUTS

    def _place(self, name: str) -> int:
        return stats.first_place(self._network, self._found, self._weights[name])

    def _centred(self, name: str) -> bool:
        return weights.can_centre(self._found, self._weights[name])

    def _matrix(self, name: str) -> Array:
        tensor = weights.tensor_of(self._found, name)
        return np.asarray(weights.blocks(self._weights[name], tensor)[0])

    def _rows(self, stream: Stream, name: str) -> tuple[Array, Array]:
        """Return rows of a weight's input here over the root of their number, and the mean taken off them."""
        weight = self._weights[name]
        tap = stats.single_tap(self._found, weight)
        assert tap is not None
        stream.advance(self._place(name), {})
        x = stats.sampled(stream, weight, tap, stats.rows_wanted(weight), self._seed)[0]
        mean = x.mean(axis=0, dtype=np.float64) if self._centred(name) else np.zeros(x.shape[1])
        x -= mean.astype(np.float32)
        x /= np.float32(len(x) ** 0.5)
        return x, mean

    def _moment(self, stream: Stream, name: str) -> tuple[Array, Array, float]:
        x, mean = self._rows(stream, name)
        return np.asarray(arrays.gram(x[None])[0]), mean, _damping(x)

    def _eliminate(
        self,
        cluster: Sequence[Chain],
        seen: Mapping[str, tuple[Array, Array, float]],
        levels: Sequence[float],
        fits: Sequence[Fit],
    ) -> None:
        """Eliminate in one cluster and enter what went, and what its readers became, at every level."""
        owners = np.concatenate([np.full(c.channels, k) for k, c in enumerate(cluster)])
        prices = np.concatenate([np.full(c.channels, self.share({c.weight: (0,)})) for c in cluster])
        patients = {
            name: Patient.of(self._matrix(name), moment, damping, self._seats(cluster, name))
            for name, (moment, _, damping) in seen.items()
        }
        self._coarse |= {name: p.coarse for name, p in patients.items()}
        limits = [self.most(c) for c in cluster]
        for fit, gone in zip(
            fits, eliminate(list(patients.values()), prices, owners, limits, levels), strict=True
        ):
            if not gone.any():
                continue
            for k, chain in enumerate(cluster):
                if (channels := np.flatnonzero(gone[owners == k])).size:
                    fit.dropped[chain.weight] = tuple(channels.tolist())
            for name, patient in patients.items():
                w = patient.w.astype(np.float32)
                fit.loss += patient.lost
                fit.tensors[name] = weights.unblocks(self._weights[name], _brief(w)[None])
                if self._centred(name):
                    fit.shifts[name] = (seen[name][1] @ (self._matrix(name) - w)).astype(np.float32)

    def most(self, chain: Chain) -> int:
        """Return how many channels may go: weights stay large enough to be weights."""
        most = chain.channels - max(1, -(-chain.channels // LEAST))
        for cut in chain.cuts:
            name = cut.node.inputs[cut.index].name or ""  # type: ignore[union-attr]  # a cut has its tensor
            if name in self._weights:
                weight = self._weights[name]
                kept = (2 * MIN_BYTES / weight.nbytes) ** 0.5
                most = min(most, int((1 - kept) * chain.channels)) if kept < 1 else 0
        return max(0, most)

    def _seats(self, cluster: Sequence[Chain], name: str) -> Array:
        """Return the rows of a reader that each channel of a cluster feeds, (channels, n); -1 for none."""
        tap = self._weights[name].tap
        parts = []
        for chain in cluster:
            spans = [e.span for e in chain.ends if e.weight == name]
            if spans:
                places = spans[0].places(range(chain.channels))
                parts.append((places[:, :, None] * tap + np.arange(tap)).reshape(chain.channels, -1))
            else:
                parts.append(np.full((chain.channels, 1), -1))
        wide = max(p.shape[1] for p in parts)
        return np.concatenate([np.broadcast_to(p, (len(p), wide)) for p in parts])

    def _rows_gone(self, dropped: Dropped) -> dict[str, Array]:
        """Return the rows of each reader that go."""
        gone: dict[str, list[Array]] = {}
        for chain in self.chains:
            if chain.weight in dropped:
                for name in _ends([chain]):
                    rows = self._seats([chain], name)[list(dropped[chain.weight])]
                    gone.setdefault(name, []).append(rows.reshape(-1))
        return {n: np.concatenate(rows) for n, rows in gone.items()}

    def _refit(self, name: str, original: Stream, pruned: Stream, gone: Array) -> tuple[Array, Array]:
        (x, mean), (seen, mean_seen) = self._rows(original, name), self._rows(pruned, name)
        w = self._matrix(name).astype(np.float32)
        kept = np.setdiff1d(np.arange(len(w)), gone)
        seen = np.ascontiguousarray(seen[:, kept])
        lack = x @ w - seen @ w[kept]
        moment = arrays.gram(seen[None])[0].astype(np.float64)
        moment[np.diag_indices(len(kept))] += _damping(seen) * (float(np.trace(moment)) / len(kept) or 1.0)
        new = np.zeros_like(w)
        new[kept] = w[kept] + np.linalg.solve(moment, (seen.T @ lack).astype(np.float64)).astype(np.float32)
        shift = mean @ w.astype(np.float64) - mean_seen @ new.astype(np.float64)
        return weights.unblocks(self._weights[name], new[None]), shift.astype(np.float32)


def _damping(x: Array) -> float:
    return float(DAMPING[0] + DAMPING[1] * min(1.0, x.shape[1] / len(x)))


def _aligned(chain: Chain, channels: Array) -> tuple[int, ...]:
    """Return the channels that go, or some less, so that those left keep :data:`ALIGNED`."""
    many = len(channels) if chain.channels % ALIGNED else len(channels) // ALIGNED * ALIGNED
    return tuple(channels[:many].tolist())


def _brief(w: Array) -> Array:
    """Return what is enough for a measurement."""
    return w.astype(np.float16) if np.abs(w).max(initial=0) < 6e4 else w


def _ends(chains: Iterable[Chain]) -> set[str]:
    """Name all that read some chains."""
    return {e.weight for c in chains for e in c.ends}


def _clusters(chains: Sequence[Chain]) -> list[list[Chain]]:
    """Put chains together that have a reader in common."""
    clusters: list[list[Chain]] = []
    for chain in chains:
        touching = [c for c in clusters if _ends(c) & _ends([chain])]
        clusters = [c for c in clusters if c not in touching]
        clusters.append([*(c for some in touching for c in some), chain])
    return clusters
