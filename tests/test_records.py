"""Plans: written, edited by hand, carried out; each is honoured or refused in one sentence, never misread."""

import json
from pathlib import Path

import numpy as np
import pytest
from edges import conv, listing, mlp, onnxdp, refused, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxdp.errors import PlanError
from onnxdp.plain import to_plain
from onnxdp.records import Candidate, File, Kept, Plan

FAST = ("--ratio", "2", "--samples", "8", "--method", "dp", "--keep-names")
ROUNDED = ("--ratio", "8", "--samples", "8")
NAMES = st.text(min_size=1, max_size=8)
PARAMS = st.dictionaries(NAMES, st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text())
CANDIDATES = st.builds(
    Candidate,
    weight=NAMES,
    method=NAMES,
    params=PARAMS,
    nbytes=st.integers(0, 2**40),
    error=st.floats(0, 1),
    damage=st.none() | st.floats(0, 1),
)
PLANS = st.builds(
    Plan,
    model_sha256=NAMES,
    target=NAMES,
    budget=st.none() | st.integers(0),
    settings=st.dictionaries(NAMES, st.none() | st.integers() | st.text()),
    choices=st.lists(CANDIDATES, max_size=4, unique_by=lambda c: c.weight).map(tuple),
    kept=st.just(()),
)


@given(PLANS)
def test_what_is_written_is_read(plan):
    assert Plan.from_json(plan.to_json()) == plan


@given(PLANS, st.data())
def test_any_cut_of_a_plan_is_refused(plan, data):
    text = plan.to_json()
    with pytest.raises(PlanError) as e:
        Plan.from_json(text[: data.draw(st.integers(0, len(text) - 1))])
    assert e.value.message.endswith(".")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(PLANS.filter(lambda p: p.choices), st.data())
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_any_value_of_another_kind_is_refused_or_read_as_it_stands(plan, data):
    raw = to_plain(plan)
    part = raw["choices"][0] if data.draw(st.booleans()) else raw
    key, value = data.draw(st.sampled_from(sorted(part))), data.draw(JSON)
    part[key] = value
    try:
        read = Plan.from_json(json.dumps(raw))
    except PlanError as e:
        assert e.message.endswith(".")
    else:
        assert to_plain(read) == raw


def test_ratio_is_of_whole_files_and_records_become_plain():
    kept = Kept("w", "because", 3)
    assert to_plain((kept, File(None, "0", 1))) == [
        {"weight": "w", "reason": "because", "nbytes": 3},
        {"path": None, "sha256": "0", "nbytes": 1},
    ]


# through the command line


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """Give a plan of in.onnx as plain JSON: w1 and w3 become float16, w2 a dictionary pair."""
    monkeypatch.chdir(tmp_path)
    save(conv())
    assert onnxdp("plan", "in.onnx", "-o", "p.json", *FAST).exit_code == 0
    return json.loads(Path("p.json").read_text())


@pytest.mark.parametrize("words", [FAST, ROUNDED], ids=["dp", "auto"])
def test_plan_and_apply_give_the_bytes_of_compress_and_dry_run_their_number(plan, words):
    if words is not FAST:
        assert onnxdp("plan", "in.onnx", "-o", "p.json", *words, "--overwrite").exit_code == 0
    dry = onnxdp("compress", "in.onnx", "--dry-run", *words, "--json")
    foreseen = json.loads(dry.stdout)["target"]["nbytes"]
    assert onnxdp("compress", "in.onnx", "direct.onnx", *words).exit_code == 0
    dry = onnxdp("apply", "in.onnx", "p.json", "--dry-run")
    assert onnxdp("apply", "in.onnx", "p.json", "planned.onnx").exit_code == 0
    assert Path("direct.onnx").read_bytes() == Path("planned.onnx").read_bytes()
    assert Path("direct.onnx").stat().st_size == foreseen
    assert f": {foreseen} bytes\nDRY RUN " in dry.stdout


@pytest.mark.parametrize("words", [FAST, ROUNDED], ids=["dp", "auto"])
def test_dry_run_writes_nothing_and_counts_external_data(plan, words):
    from edges import save_external

    save_external(conv(), "e.onnx", "e.data")
    before = listing()
    dry = onnxdp("compress", "e.onnx", "out.onnx", "--dry-run", *words, "--json")
    assert dry.exit_code == 0 and listing() == before
    assert onnxdp("compress", "e.onnx", "out.onnx", *words).exit_code == 0
    new = sum(Path(name).stat().st_size for name in listing().keys() - before.keys())
    assert json.loads(dry.stdout)["target"]["nbytes"] == new


def test_the_plan_reports_the_same_choices_as_the_report(plan):
    done = onnxdp("compress", "in.onnx", "out.onnx", *FAST, "--report", "r.json")
    assert done.exit_code == 0
    report = json.loads(Path("r.json").read_text())
    assert report["plan"] == plan and [x["weight"] for x in report["lines"]] == ["w1", "w2", "w3"]
    assert report["ratio"] == report["source"]["nbytes"] / report["target"]["nbytes"]


def pair(plan):
    return next(c for c in plan["choices"] if c["method"] == "dp")


def test_atoms_edited_by_hand_are_honoured(plan):
    assert onnxdp("apply", "in.onnx", "p.json", "before.onnx").exit_code == 0
    params, sizes = pair(plan)["params"], {}
    for atoms in (params["atoms"] - 1, params["atoms"] - 9, 1):
        params["atoms"] = atoms
        Path("q.json").write_text(json.dumps(plan))
        assert onnxdp("apply", "in.onnx", "q.json", f"{atoms}.onnx").exit_code == 0
        sizes[atoms] = Path(f"{atoms}.onnx").stat().st_size
    few, one = sorted(sizes)[1], 1
    numbers = 2 * (288 // params["parts"] + 48) * params["parts"]  # bytes of one atom and its codes
    assert abs((sizes[few] - sizes[one]) - (few - one) * numbers) <= 16  # dims take a byte more or less


def test_a_method_edited_by_hand_and_a_choice_taken_out_are_honoured(plan):
    choice = pair(plan)
    choice.update(method="float16", params={})
    plan["budget"] = None  # that is more bytes
    Path("q.json").write_text(json.dumps(plan))
    done = onnxdp("apply", "in.onnx", "q.json", "half.onnx", "--json")
    assert {x["method"] for x in json.loads(done.stdout)["lines"]} == {"float16"}
    plan["choices"] = [c for c in plan["choices"] if c is choice]
    Path("q.json").write_text(json.dumps(plan))
    done = onnxdp("apply", "in.onnx", "q.json", "one.onnx", "--json")
    lines = {x["weight"]: (x["method"], x["reason"]) for x in json.loads(done.stdout)["lines"]}
    assert lines["w1"] == ("", "is not in the plan") and lines[choice["weight"]][0] == "float16"


REAL = "The plan was made on real inputs, which it does not hold; give them again with --"


@pytest.mark.parametrize("option", ["inputs", "calibrate"])
def test_a_plan_of_real_inputs_needs_them_again(plan, option):
    (fed,) = conv().graph.input
    shape = [d.dim_value for d in fed.type.tensor_type.shape.dim][1:]
    numbers = np.random.default_rng(5).standard_normal((8, *shape)).astype(np.float32)
    np.savez("real.npz", **{fed.name: 1 + numbers})
    words = (*FAST, f"--{option}", "real.npz")
    assert onnxdp("plan", "in.onnx", "-o", "r.json", *words).exit_code == 0
    refused(2, f"{REAL}{option}.", "apply", "in.onnx", "r.json", "out.onnx")
    other = {"inputs": "calibrate", "calibrate": "inputs"}[option]
    refused(2, f"{REAL}{option}.", "apply", "in.onnx", "r.json", "out.onnx", f"--{other}", "real.npz")
    assert onnxdp("apply", "in.onnx", "r.json", "out.onnx", f"--{option}", "real.npz").exit_code == 0
    assert onnxdp("compress", "in.onnx", "direct.onnx", *words).exit_code == 0
    assert Path("out.onnx").read_bytes() == Path("direct.onnx").read_bytes()


OTHER = "The plan was made for another model (its sha256 differs); make one with 'onnxdp plan'."


def test_a_plan_of_another_model_is_refused(plan):
    save(mlp(), "other.onnx")
    refused(2, OTHER, "apply", "other.onnx", "p.json", "out.onnx")


def params(**changes):
    return lambda p: pair(p)["params"].update(changes)


def choice(**changes):
    return lambda p: pair(p).update(changes)


def option(**changes):
    return lambda p: p["settings"].update(changes)


BY_HAND = {
    "model": (lambda p: p.update(model_sha256="0" * 64), OTHER),
    "newer": (
        lambda p: p.update(schema=2),
        "The plan has schema 2 and this onnxdp reads schema 1; write it again with 'onnxdp plan'.",
    ),
    "no schema": (
        lambda p: p.pop("schema"),
        "The plan has schema None and this onnxdp reads schema 1; write it again with 'onnxdp plan'.",
    ),
    "bool for a number": (
        lambda p: p.update(schema=True),
        "plan.schema is True, which is not of the kind int; correct it by hand.",
    ),
    "unknown key": (
        lambda p: p.update(ratoi=2),
        "plan has an unknown field 'ratoi'; remove it or correct its spelling.",
    ),
    "unknown key within": (
        choice(atoms=3),
        "plan.choices[1] has an unknown field 'atoms'; remove it or correct its spelling.",
    ),
    "lacking": (
        lambda p: pair(p).pop("method"),
        "plan.choices[1] lacks the field 'method'; write the plan again with 'onnxdp plan'.",
    ),
    "text for bytes": (
        choice(nbytes="5"),
        "plan.choices[1].nbytes is '5', which is not of the kind int; correct it by hand.",
    ),
    "nan": (
        choice(error=float("nan")),
        "The plan is not JSON (NaN is no number of JSON); write it again with 'onnxdp plan'.",
    ),
    "nan atoms": (
        params(atoms=float("nan")),
        "The plan is not JSON (NaN is no number of JSON); write it again with 'onnxdp plan'.",
    ),
    "atoms 0": (params(atoms=0), "w2: atoms is 0 and must lie between 1 and 48."),
    "atoms 49": (params(atoms=49, parts=1, axis="rows"), "w2: atoms is 49 and must lie between 1 and 48."),
    "atoms 5.0": (params(atoms=5.0), "w2: atoms is 5.0, not of type int; correct it."),
    "atoms '5'": (params(atoms="5"), "w2: atoms is '5', not of type int; correct it."),
    "parts": (
        params(parts=7, axis="rows"),
        "w2: 7 blocks along the rows do not divide 32; correct parts.",
    ),
    "axis": (params(axis="diagonal"), "w2: axis is 'diagonal', not rows or columns; correct it."),
    "dtype": (
        params(dtype="int8"),
        "w2: dtype is float16 or float32, run is fold or split; correct them.",
    ),
    "unknown parameter": (params(rank=3), "w2: dp has no parameter 'rank'; remove it."),
    "no parameter": (
        lambda p: pair(p)["params"].pop("atoms") and None,
        "w2: dp needs the parameter 'atoms'; write the plan again.",
    ),
    "dictionary": (
        params(dictionary="w1"),
        "w2 cannot share the dictionary of 'w1'; write the plan again with 'onnxdp plan'.",
    ),
    "weight": (
        choice(weight="w9"),
        "The plan names 'w9', which is no weight of the model; see 'onnxdp inspect'.",
    ),
    "method": (choice(method="magic"), "The plan stores w2 by 'magic'; its settings know dp, float16."),
    "twice": (
        lambda p: p["choices"].append(pair(p)),
        "The plan names 'w2' twice; leave one of the two choices.",
    ),
    "changed and kept": (
        lambda p: p["kept"].append({"weight": "w2", "reason": "", "nbytes": 1}),
        "The plan both changes and keeps 'w2'; remove it from choices or from kept.",
    ),
    "setting": (
        option(sede=1),
        "The plan's settings have an unknown entry 'sede'; remove it.",
    ),
    "no setting": (
        lambda p: p["settings"].pop("seed"),
        "The plan's settings lack 'seed'; write it again with 'onnxdp plan'.",
    ),
    "real inputs of no kind": (
        option(real_inputs="dreams"),
        "The plan was made on real inputs, which it does not hold; give them again with --inputs or "
        "--calibrate.",
    ),
    "setting's kind": (
        option(seed=0.5),
        "The plan's settings are unusable: seed is 0.5, which is not of the kind int; correct it.",
    ),
    "setting's truth": (
        option(unweighted="no"),
        "The plan's settings are unusable: unweighted is 'no', which is not of the kind bool; correct it.",
    ),
    "setting's value": (
        option(solver="magic"),
        "The plan's settings are unusable: --solver is one of exact, randomized, dpl, not 'magic'.",
    ),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_a_plan_edited_into_nonsense_is_refused_in_one_sentence(plan, case):
    edit, message = BY_HAND[case]
    edit(plan)
    Path("q.json").write_text(json.dumps(plan))
    refused(2, message, "apply", "in.onnx", "q.json", "out.onnx")


TEXTS = {
    "a list": ("[]", "The plan is not a JSON object; write it again with 'onnxdp plan'."),
    "cut": (
        '{"schema": 1,',
        "The plan is not JSON (Expecting property name enclosed in double quotes: line 1 column 14 "
        "(char 13)); write it again with 'onnxdp plan'.",
    ),
    "a key twice": (
        '{"schema": 1, "schema": 1}',
        "The plan is not JSON ('schema' is there twice in one object); write it again with 'onnxdp plan'.",
    ),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_is_no_plan_is_refused(plan, case):
    text, message = TEXTS[case]
    Path("q.json").write_text(text)
    refused(2, message, "apply", "in.onnx", "q.json", "out.onnx")


def test_a_plan_too_deep_to_read_is_refused(plan):
    Path("q.json").write_text("[" * 100_000)
    done = onnxdp("apply", "in.onnx", "q.json", "out.onnx")
    assert done.exit_code == 2 and done.stderr.startswith("error: The plan is not JSON (")


def test_a_plan_that_gains_nothing_is_not_carried_out(plan):
    text = json.dumps({**plan, "choices": []})
    Path("q.json").write_text(text)
    message = "Nothing to gain: the plan changes no weight; write it again with 'onnxdp plan'."
    refused(1, message, "apply", "in.onnx", "q.json", "out.onnx")
    pair(plan)["params"].update(atoms=48, dtype="float32", parts=1, axis="rows")
    Path("q.json").write_text(json.dumps(plan))
    for words in (("out.onnx",), ("--dry-run",)):
        done = onnxdp("apply", "in.onnx", "q.json", *words)
        assert done.exit_code == 1 and done.stderr.startswith(
            "error: Nothing to gain: the result would have "
        )
    assert not Path("out.onnx").exists()
