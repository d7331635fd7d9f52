"""The workshop: weights are solved side by side, candidates become arrays, arrays what a session is fed.

Here the array boundary is crossed: host tensors in, one weight at a time on the device, host arrays out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from onnxdp import arrays, planner, stats, weights
from onnxdp.build import unlike_others
from onnxdp.errors import PlanError, misfit
from onnxdp.methods.form import Aimed, Foreseeing, Form, Holding, Keeping, Lighter, Restorable, Solved, Task
from onnxdp.network import Network
from onnxdp.pieces import Stream
from onnxdp.planner import Item
from onnxdp.probes import Probes
from onnxdp.records import Array, Candidate, Encoded, Weight
from onnxdp.settings import Progress, Settings
from onnxdp.stats import Seen
from onnxdp.weights import Found

Group = tuple[str, ...]
_WIDE = 3000
"""Inputs of a weight from which its second moment, which rounding needs whole, takes tens of megabytes."""
_LARGE = 8_000_000
"""Numbers of a weight from which it is not solved beside another such."""
_LIGHT = 400_000_000
"""Multiply-accumulates of one sample up to which a choice is encoded twice, to weigh changes within it."""
_TRIED_ON = 0.5
"""Share of its rows that a weight is first rounded on, where it is once more: that only tells its errors."""
MANY = 96
"""Samples from which every other feed is enough for arrays that are not kept."""


@dataclass(frozen=True, slots=True)
class Solutions:
    """What was solved: the mean that each weight sees, (groups, inputs), and arrays by form and weight."""

    means: Mapping[str, Array]
    made: Mapping[tuple[str, str], Sequence[Encoded]]


class Workshop:
    """Solves the weights of one model with some forms, and encodes whatever is chosen.

    Parameters
    ----------
    found : Found
    forms : sequence of Form
        In order of preference; several may offer candidates for one weight.
    settings : Settings
    device : {"cpu", "cuda"}
    bits : float
        What the target leaves each number, on average.
    also : tuple of float
        What further targets leave, to which :meth:`aim` turns.
    opset : int
        Of the model.
    """

    def __init__(
        self,
        found: Found,
        forms: Sequence[Form],
        settings: Settings,
        *,
        device: str,
        bits: float = 16.0,
        also: tuple[float, ...] = (),
        opset: int = 17,
    ) -> None:
        self.found = found
        self.forms = {f.name: f for f in forms}
        self.weights = {w.name: w for w in found.weights}
        self._settings = settings
        self._device = device
        self._bits = bits
        self._also = also
        self._opset = opset
        self._source: tuple[Network, Probes] | None = None
        self._keep_samples = settings.solver == "dpl"
        self._solved: dict[tuple[str, Group], Solved] = {}
        self._one_at_a_time = threading.Lock()
        self._means: dict[str, Array] = {}
        self._expected: dict[str, Array] = {}
        self._last: dict[tuple[str, Group], tuple[Any, tuple[Encoded, ...]]] = {}
        self._samples: dict[str, Array] = {}
        self._groups = self._grouped()

    def solve(self, network: Network | None, probes: Probes | None, progress: Progress) -> None:
        """Gather what each weight sees and factor it, chunk by chunk, layers side by side.

        Raises
        ------
        UsageError
            What the weights see holds a value that is not a number.
        """
        items = [[self.weights[n] for n in group] for group in self._items() if not self._is_solved(group)]
        total = len(self.weights)
        done = 0
        self._source = (network, probes) if network is not None and probes is not None else None
        stream, share = None, 1.0
        if network is not None and probes is not None:
            stream, share = self._shown(network, probes, tried=self._tried)
        if network is not None:
            items.sort(key=lambda item: stats.first_place(network, self.found, item[0]))

        def gathered(chunk: Sequence[Sequence[Weight]]) -> tuple[list[Weight], dict[str, Seen]]:
            members = [w for item in chunk for w in item]
            if network is None or stream is None:
                return members, {}
            return members, stats.gather(stream, self.found, members, network, seed=self.seed, share=share)

        for members, seen in arrays.ahead(gathered, stats.chunks(items, probes.samples if probes else 1)):
            arrays.trim()
            tasks = {w.name: self._task(w, seen.get(w.name)) for w in members}
            jobs: list[tuple[Form, Group]]
            jobs = [(f, (w.name,)) for w in members for f in self._supporting(w)]
            jobs += [(self.forms[m], g) for g, m in self._groups.items() if g[0] in tasks]
            with arrays.one_blas_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
                results = pool.map(partial(self._run, tasks), jobs)
                for (form, group), solved in zip(jobs, results, strict=True):
                    self._solved[form.name, group] = solved
                    if len(group) == 1 and form is next(iter(self.forms.values())):
                        done += 1
                        progress("solving weights", done, total, group[0])
            for name, what in seen.items():
                if what.mean is not None:
                    self._means[name] = what.mean
                if self._keep_samples:
                    self._samples[name] = what.samples
            tasks.clear()  # large, and not wanted beside the next
            seen.clear()
        progress("solving weights", total, total, "")

    @property
    def _tried(self) -> bool:
        """Whether ways are only tried, and what is chosen is made once more."""
        return self.sequential and self._settings.refit is not False

    @staticmethod
    def _shown(network: Network, probes: Probes, *, tried: bool) -> tuple[Stream, float]:
        """Return what shows weights their inputs, and the share of the rows that they take."""
        if not tried:
            return Stream(network, probes), 1.0
        return Stream(network, probes.every(2) if probes.samples >= MANY else probes), _TRIED_ON

    def rest(self) -> None:
        """Let go of what was solved: nothing is encoded any more."""
        self._solved.clear()
        self._last.clear()
        self._samples.clear()
        self._source = None

    def restore(self, kept: Solutions) -> None:
        """Take up what an earlier run solved, as far as it goes; :meth:`solve` does the rest.

        Raises
        ------
        UsageError
            What was kept fits no weight here.
        """
        for w in self.weights.values():
            for form in self._supporting(w):
                if not isinstance(form, Restorable):
                    continue
                made = kept.made.get((form.name, w.name), ())
                for e in made:
                    form.check(w, e.params)
                    if not form.fits(w, e):
                        raise misfit(w.name)
                solved = form.restored(self._task(w, None), made, self._settings, device=self._device)
                if solved is not None:
                    self._solved[form.name, (w.name,)] = solved
        self._means |= {n: m for n, m in kept.means.items() if n in self.weights}

    def kept(self) -> Solutions:
        """Return what was solved, as far as it can be kept."""
        made = {
            (form, group[0]): solved.kept()
            for (form, group), solved in self._solved.items()
            if isinstance(solved, Keeping)
        }
        return Solutions(dict(self._means), made)

    def _supporting(self, weight: Weight) -> list[Form]:
        return [f for f in self.forms.values() if f.supports(weight) is None]

    def _is_solved(self, group: Group) -> bool:
        """Whether nothing is left to solve for weights that are decided together."""
        jobs = {(f.name, (n,)) for n in group for f in self._supporting(self.weights[n])}
        return len(group) == 1 and jobs <= set(self._solved)

    def aim(self, bits: float) -> None:
        """Turn to another target, one of those that were named at the start."""
        self._bits = bits
        for solved in self._solved.values():
            if isinstance(solved, Aimed):
                solved.aim(bits)

    def items(self) -> list[Item]:
        """Return the candidates of every weight, ready for the planner."""
        result = []
        for group in self._items():
            alone = {}
            for name in group:
                options = [planner.keep(self.weights[name])]
                for form in self.forms.values():
                    solved = self._solved.get((form.name, (name,)))
                    options += [c for (c,) in solved.candidates()] if solved else []
                alone[name] = self._fixed(options) if self._settings.atoms else self._undominated(options)
            together: list[tuple[Candidate, ...]] = []
            if len(group) > 1 and self._settings.shared is not False:
                for form in self.forms.values():
                    solved = self._solved.get((form.name, group))
                    together += solved.candidates() if solved else []
            item = Item(group, alone, tuple(together))
            result.append(item.sharing() if self._settings.shared else item)
        return result

    def points(self, name: str, *, middle: bool = False) -> list[Candidate]:
        """Return candidates of one weight alone, spread over those the target may need (or their middle)."""
        found = []
        for form in self.forms.values():
            solved = self._solved.get((form.name, (name,)))
            own = [c for (c,) in solved.points()] if solved else []
            found += own[len(own) // 2 : len(own) // 2 + 1] if middle else own
        return found

    def check(self, candidates: Iterable[Candidate]) -> None:
        """Refuse candidates of a plan that name what does not exist, or fit no weight here.

        Raises
        ------
        PlanError
            One of them does.
        """
        for c in candidates:
            if c.weight not in self.weights:
                raise PlanError(
                    f"The plan names {c.weight!r}, which is no weight of the model; see 'onnxdp inspect'."
                )
            form = self.forms.get(c.method)
            if form is None:
                known_forms = ", ".join(self.forms)
                raise PlanError(
                    f"The plan stores {c.weight} by {c.method!r}; its settings know {known_forms}."
                )
            refusal = form.supports(self.weights[c.weight])
            if refusal:
                raise PlanError(f"The plan stores {c.weight} by {c.method}, but it {refusal}.")
            form.check(self.weights[c.weight], c.params)

    def outline(self, candidates: Iterable[Candidate]) -> list[Encoded]:
        """Return arrays of the right types and shapes for the candidates: enough to count bytes."""
        return [self._outlined(c) for c in candidates if c.method != planner.KEEP]

    def _outlined(self, candidate: Candidate) -> Encoded:
        made = self.forms[candidate.method].outline(self.weights[candidate.weight], candidate.params)
        solved = self._solved.get((candidate.method, (candidate.weight,)))
        return solved.foreseen(made) if isinstance(solved, Foreseeing) else made

    def encode(self, candidates: Iterable[Candidate]) -> list[Encoded]:
        """Return the arrays of the candidates that change something; those that share are encoded together.

        Raises
        ------
        PlanError
            Candidates that should share a dictionary do not agree.
        """
        jobs: dict[tuple[str, Group], list[Candidate]] = {}
        for c in candidates:
            if c.method != planner.KEEP:
                jobs.setdefault((c.method, self._group_of(c)), []).append(c)
        with arrays.one_blas_thread(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            return [e for some in pool.map(lambda job: self._encode(*job), jobs.items()) for e in some]

    def shifts(self, encoded: Sequence[Encoded]) -> dict[str, Array]:
        """Return what the bias behind each weight gains, (outputs,), where it can take up the mean."""
        shifts = {e.weight: self._shift(e, self.decode(e)) for e in encoded if e.weight in self._means}
        return {name: shift for name, shift in shifts.items() if shift is not None}

    def no_shifts(self, encoded: Sequence[Encoded]) -> dict[str, Array]:
        """Return numbers where :meth:`shifts` has some: enough to count bytes."""
        weights_ = (self.weights[e.weight] for e in encoded if e.weight in self._means)
        return {
            w.name: unlike_others(np.zeros(w.groups * w.outputs, np.float32), w.name) / 1024 for w in weights_
        }

    def _shift(self, encoded: Encoded, decoded: Array) -> Array | None:
        mean = self._means.get(encoded.weight)
        if mean is None:
            return None
        weight = self.weights[encoded.weight]
        if encoded.weight not in self._expected:
            tensor = weights.tensor_of(self.found, encoded.weight)
            self._expected[encoded.weight] = stats.mean_output(mean, weights.blocks(weight, tensor))
        shift = self._expected[encoded.weight] - stats.mean_output(mean, weights.blocks(weight, decoded))
        return shift.astype(np.float32)

    def fed(
        self, network: Network, encoded: Sequence[Encoded], shifts: Mapping[str, Array] | None = None
    ) -> dict[str, Array]:
        """Return weights and biases for the lifted network; biases shift as weights need where None."""
        changes: dict[str, Array] = {}
        for e in encoded:
            if e.weight not in network.fed:
                continue
            decoded = self.decode(e)
            shift = self._shift(e, decoded) if shifts is None else shifts.get(e.weight)
            changes[e.weight] = decoded.astype(np.dtype(self.weights[e.weight].dtype), copy=False)
            if shift is not None:
                changes.update(stats.shifted_bias(network, self.found, e.weight, shift))
        return changes

    def decode(self, encoded: Encoded) -> Array:
        """Return the stored tensor's replacement, float32."""
        return self.forms[encoded.method].decode(self.weights[encoded.weight], encoded)

    def encode_one(
        self,
        candidate: Candidate,
        tensor: Array,
        samples: Array,
        lack: Array | None = None,
        *,
        quick: bool = False,
        spare: float = 0.0,
        memo: dict[str, Any] | None = None,
    ) -> Encoded:
        """Encode another tensor in the form of a candidate that shares nothing, on other samples.

        Its numbers may take so many bits more as there are to ``spare``; what does not depend on these stays
        in the ``memo`` for another try.
        """
        weight = self.weights[candidate.weight]
        form = self.forms[candidate.method]
        seen = None if self._settings.unweighted else samples
        task = Task(weight, tensor, seen, False, self._bits, lack, quick, spare=spare, memo=memo)
        with arrays.one_blas_thread():
            return form.encode(task, candidate.params, self._settings, device=self._device)

    @property
    def light(self) -> bool:
        """Whether encoding a choice once more, to weigh changes within it, takes little."""
        return stats.macs(self.found.weights) <= _LIGHT

    @property
    def sequential(self) -> bool:
        """Whether some form wants its weights encoded in the compressed network."""
        return any(f.sequential for f in self.forms.values())

    @property
    def sharing_is_asked(self) -> bool:
        """Whether sharing is not to be questioned."""
        return self._settings.shared is True

    @property
    def seed(self) -> int:
        """Seed of every random choice."""
        return self._settings.seed

    @property
    def _first(self) -> str:
        return next(iter(self.forms))

    def _grouped(self) -> dict[Group, str]:
        """Return the groups that may share arrays, each with the method; a weight is in one at most."""
        if self._settings.shared is False:
            return {}
        sources = stats.sources(self.found)
        taken: set[str] = set()
        groups: dict[Group, str] = {}
        for form in self.forms.values():
            for group in form.groups(self.found.weights, sources, everywhere=bool(self._settings.shared)):
                if not taken & set(group):
                    taken.update(group)
                    groups[group] = form.name
        return groups

    def _items(self) -> list[Group]:
        """Return every weight once, in graph order; those of a group together."""
        group_of = {n: g for g in self._groups for n in g}
        return list(dict.fromkeys(group_of.get(w.name, (w.name,)) for w in self.found.weights))

    def _task(self, weight: Weight, seen: Seen | None) -> Task:
        tensor = weights.tensor_of(self.found, weight.name)
        readers = self.found.readers[weight.name]
        inside = readers[0].node.graph is self.found.values[weight.name].graph
        splittable = len(readers) == 1 and readers[0].direct and inside
        samples = seen.samples if seen and not self._settings.unweighted else None
        even = splittable and weights.even(readers[0].node, weight)
        return Task(
            weight,
            tensor,
            samples,
            splittable,
            self._bits,
            even=even,
            also=self._also,
            opset=self._opset,
            total=sum(w.size for w in self.weights.values()),
        )

    def _task_kept(self, name: str) -> Task:
        """Return the task with the samples that were kept, if any."""
        return replace(self._task(self.weights[name], None), samples=self._samples.get(name))

    def _task_again(self, name: str, *, tried: bool) -> Task:
        """Gather what one weight sees once more, where it was not kept; as it was tried, or all."""
        weight = self.weights[name]
        if name in self._samples or self._source is None or self._settings.unweighted:
            return self._task_kept(name)
        network, probes = self._source
        stream, share = self._shown(network, probes, tried=tried)
        seen = stats.gather(stream, self.found, [weight], network, seed=self.seed, share=share)
        return self._task(weight, seen.get(name))

    def _run(self, tasks: Mapping[str, Task], job: tuple[Form, Group]) -> Solved:
        form, group = job
        large = any(
            self.weights[n].size > _LARGE or (form.sequential and self.weights[n].inputs > _WIDE)
            for n in group
        )
        with self._one_at_a_time if large else nullcontext():  # each needs several times its own memory
            return form.solve([tasks[n] for n in group], self._settings, device=self._device)

    def macs(self, candidate: Candidate) -> float:
        """Return the multiply-accumulates that a candidate leaves, over those of the weight as it was."""
        form = self.forms.get(candidate.method)
        if not isinstance(form, Lighter):
            return 1.0
        return form.macs(self.weights[candidate.weight], candidate.params)

    def _undominated(self, options: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Leave out what is no smaller than the original, or neither smaller nor nearer than another.

        Where operations count, a candidate of fewer stays, too.
        """
        kept = options[0]
        best: list[Candidate] = [kept]
        floors: dict[float, float] = {}  # operations -> least error
        for c in sorted(options[1:], key=lambda c: (c.nbytes, c.error)):
            macs = self.macs(c) if self._settings.macs is not None else 1.0
            floor = min((e for m, e in floors.items() if m <= macs), default=float("inf"))
            if c.nbytes < kept.nbytes and c.error < floor:
                best.append(c)
                floors[macs] = c.error
        return tuple(best)

    def _fixed(self, options: Sequence[Candidate]) -> tuple[Candidate, ...]:
        """Where the number of atoms is given: the pair wherever it is the smaller, else what there is."""
        kept = options[0]
        pairs = [c for c in options[1:] if c.method == self._first and c.nbytes < kept.nbytes]
        return (kept, *(pairs[:1] or [c for c in options[1:] if c.nbytes < kept.nbytes]))

    def _group_of(self, candidate: Candidate) -> Group:
        first = candidate.params.get("dictionary")
        if first is None:
            return (candidate.weight,)
        for group in self._groups:
            if group[0] == first and candidate.weight in group:
                return group
        raise PlanError(
            f"{candidate.weight} cannot share the dictionary of {first!r}; "
            "write the plan again with 'onnxdp plan'."
        )

    def _encode(self, key: tuple[str, Group], chosen: list[Candidate]) -> tuple[Encoded, ...]:
        group = key[1]
        by_name = {c.weight: c for c in chosen}
        alike = {tuple((k, v) for k, v in c.params.items() if k != "run") for c in chosen}
        if set(by_name) != set(group) or len(alike) > 1:
            raise PlanError(
                f"{', '.join(group)} share a dictionary and must all be planned with the same parameters."
            )
        params = tuple(tuple(sorted(by_name[n].params.items())) for n in group)
        kept = self._last.get(key)
        if kept is not None and kept[0] == params:
            return kept[1]
        solved = self._solved[key]
        ready = solved.ready([by_name[n].params for n in group])
        held = self._tried and isinstance(solved, Holding) and solved.holds
        tasks = [self._task_kept(n) if ready else self._task_again(n, tried=held) for n in group]
        encoded = solved.encode(tasks, [by_name[n].params for n in group])
        self._last[key] = (params, encoded)
        return encoded
