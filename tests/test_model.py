"""Reading refuses what is unsound, writing is whole or nothing, what is not edited stays as it was."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxdp import draft, walk
from onnxdp import model as room
from onnxdp.errors import ModelError, SetupError, UsageError

SHARED = Path(os.environ.get("ONNXDP_SHARED", Path(__file__).parents[2] / "shared"))
REAL = sorted((SHARED / "data").glob("*/*.onnx"))


def tiny(**arrays: np.ndarray) -> ModelProto:
    """y = x W (64 x 32), with more initializers on request."""
    rng = np.random.default_rng(0)
    weights = {"W": rng.standard_normal((64, 32), dtype=np.float32), **arrays}
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "W"], ["y"], name="mm")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [numpy_helper.from_array(a, n) for n, a in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def saved(folder: Path, proto: ModelProto, name: str = "m.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def external(
    folder: Path, proto: ModelProto | None = None, name: str = "m.onnx", data: str = "m.data"
) -> Path:
    """Save with every initializer in a data file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    onnx.save(proto or tiny(), path, save_as_external_data=True, location=data, size_threshold=0)
    return path


def weight(model: room.Model, name: str = "W") -> np.ndarray:
    return model.ir.graph.initializers[name].const_value.numpy()


def listing(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def refused(source: object, *words: str) -> None:
    with pytest.raises(ModelError) as e:
        room.read(source)
    message = e.value.message
    assert message.endswith(".")
    assert "\n" not in message
    for word in words:
        assert word in message, message


# What is not edited comes out as it went in (peers.md 2.19, 2.27, 2.29)


def normalised(proto: ModelProto) -> ModelProto:
    """Apply the changes that the docstring of model.py calls harmless, and no others."""
    out = ModelProto.FromString(proto.SerializeToString())

    def clean(message: object) -> None:
        for field, value in message.ListFields():
            if field.is_repeated and field.message_type:
                for item in value:
                    clean(item)
            elif field.message_type:
                clean(value)
            if field.name == "metadata_props":
                entries = sorted(value, key=lambda e: e.key)
                del value[:]
                value.extend(entries)
        for field in message.DESCRIPTOR.fields:
            string = field.type == field.TYPE_STRING and not field.is_repeated
            if string and message.HasField(field.name) and getattr(message, field.name) == "":
                message.ClearField(field.name)
            if field.name == "model_version" and message.model_version == 0:
                message.ClearField("model_version")
            if field.name == "type" and field.message_type and message.type == onnx.TypeProto():
                message.ClearField("type")
            if field.name == "domain" and message.domain == "ai.onnx":
                message.ClearField("domain")

    def order(graph: onnx.GraphProto) -> None:
        made = {o for n in graph.node for o in n.output} | {t.name for t in graph.initializer}
        made -= {o.name for o in graph.output}
        infos = sorted((v for v in graph.value_info if v.name in made), key=lambda v: v.name)
        del graph.value_info[:]
        graph.value_info.extend(infos)
        for node in graph.node:
            while node.output and not node.output[-1]:
                node.output.pop()
            for attribute in node.attribute:
                for sub in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                    order(sub)

    clean(out)
    order(out.graph)
    return out


@pytest.mark.parametrize("path", REAL or [None], ids=lambda p: p.stem if p else "none")
def test_real_models_come_back_unchanged(path: Path | None) -> None:
    if path is None:
        pytest.skip(f"needs the real models of {SHARED}")
    before = onnx.load(path)
    model = room.read(path)
    after = room.serialize(model)
    assert normalised(after) == normalised(before)
    tensors = [[t.SerializeToString() for t in walk.tensor_protos(p)] for p in (after, before)]
    assert tensors[0] == tensors[1]
    assert room.serialize(room.copy(model)) == after
    assert room.output_size(model) == after.ByteSize() <= path.stat().st_size == model.nbytes
    assert model.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def awkward() -> ModelProto:
    """Hold everything that a round trip is known to lose somewhere (runtime.md section 5)."""
    proto = tiny(unused=np.arange(4, dtype=np.int64))
    proto.producer_name, proto.producer_version, proto.domain = "maker", "1", "here"
    proto.model_version, proto.doc_string = 3, "about the model"
    proto.metadata_props.add(key="k", value="v")
    graph = proto.graph
    graph.doc_string = "about the graph"
    graph.metadata_props.add(key="gk", value="gv")
    graph.node[0].doc_string = "about the node"
    graph.node[0].metadata_props.add(key="nk", value="nv")
    graph.input[0].doc_string = "about x"
    graph.input[0].type.denotation = "TENSOR"
    graph.input[0].type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    graph.input.add().CopyFrom(helper.make_tensor_value_info("W", TensorProto.FLOAT, [64, 32]))
    annotation = graph.quantization_annotation.add(tensor_name="W")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="s")
    tensor = graph.initializer.add(name="f", dims=[3], data_type=TensorProto.FLOAT, float_data=[1, 2, 3])
    tensor.doc_string = "typed field"
    tensor.metadata_props.add(key="tk", value="tv")
    half = graph.initializer.add(name="h", dims=[2], data_type=TensorProto.FLOAT16, int32_data=[15360, 0])
    half.metadata_props.add(key="hk", value="hv")
    graph.initializer.add(name="s", dims=[2], data_type=TensorProto.STRING, string_data=[b"a", b"\xff"])
    graph.initializer.add(name="i4", dims=[3], data_type=TensorProto.INT4, raw_data=b"\x21\x03")
    graph.initializer.add(name="b", dims=[2], data_type=TensorProto.BFLOAT16, raw_data=b"\x80\x3f\x00\x40")
    graph.initializer.add(name="none", dims=[0, 3], data_type=TensorProto.FLOAT)
    graph.node.add(op_type="F", domain="local", input=["y"], output=["z"], name="call", overload="o")
    graph.output.add().CopyFrom(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["n", 32]))
    body = [helper.make_node("Relu", ["a"], ["b"])]
    function = helper.make_function(
        "local", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)], overload="o"
    )
    function.metadata_props.add(key="fk", value="fv")
    proto.functions.append(function)
    proto.opset_import.add(domain="local", version=1)
    proto.ir_version = 10
    return proto


def test_nothing_awkward_is_lost(tmp_path: Path) -> None:
    proto = awkward()
    before = proto.SerializeToString()
    for source in (proto, saved(tmp_path, proto), ir.from_proto(awkward())):
        model = room.read(source)
        for m in (model, room.copy(model)):
            assert normalised(room.serialize(m)) == normalised(proto)
    assert proto.SerializeToString() == before
    external_copy = room.read(external(tmp_path / "e", awkward()))
    assert normalised(room.serialize(external_copy)).graph.node == normalised(proto).graph.node
    for tensor in room.serialize(external_copy).graph.initializer:
        original = next(t for t in proto.graph.initializer if t.name == tensor.name)
        if tensor.data_type == TensorProto.STRING:
            assert tensor.string_data == original.string_data
        else:
            assert ir.from_proto(tensor).tobytes() == ir.from_proto(original).tobytes()


def test_value_info_is_not_added() -> None:
    model = room.read(tiny())
    model.ir.graph.node(0).outputs[0].shape = ir.Shape([1, 32])
    model.ir.graph.initializers["W"].const_value = ir.tensor(np.zeros((64, 32), np.float16))
    assert not room.serialize(model).graph.value_info


def test_copy_is_independent_and_shares_tensors() -> None:
    model = room.read(tiny())
    twin = room.copy(model)
    assert twin.ir.graph.initializers["W"].const_value is model.ir.graph.initializers["W"].const_value
    before = room.serialize(model)
    twin.ir.graph.node(0).op_type = "Gemm"
    twin.ir.graph.initializers["W"].const_value = ir.tensor(np.zeros((1,), np.float32))
    assert room.serialize(model) == before


# Sources and what is given back


def test_every_type_goes_in_and_comes_back(tmp_path: Path) -> None:
    proto = tiny()
    x = np.ones((2, 64), np.float32)
    expected = x @ numpy_helper.to_array(proto.graph.initializer[0])
    for source in (proto, ir.from_proto(proto), gs.import_onnx(proto), str(saved(tmp_path, proto))):
        model = room.read(source)
        back = room.give_back(model, source)
        assert isinstance(back, ModelProto if isinstance(source, str) else type(source))
        again = room.serialize(room.read(back))
        assert again.ir_version == 8
        session = ort.InferenceSession(again.SerializeToString(), providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {"x": x})
        # 64 products of float32: |error| <= 64 eps sum |x||w|, and sum |w| < 64 * 5
        np.testing.assert_allclose(y, expected, atol=64 * np.finfo(np.float32).eps * 320)


def test_a_stranger_is_refused() -> None:
    with pytest.raises(UsageError, match="int is no model"):
        room.read(3)  # type: ignore[arg-type]  # the point of the test


# Refusals (runtime.md section 6; peers.md 2.32, 2.39)


def change(**edits: object) -> Callable[[ModelProto], None]:
    def edit(proto: ModelProto) -> None:
        for key, value in edits.items():
            if isinstance(value, list):
                del getattr(proto.graph.initializer[0], key)[:]
                getattr(proto.graph.initializer[0], key).extend(value)
            else:
                setattr(proto.graph.initializer[0], key, value)

    return edit


def add_node(*outputs: str, inputs: tuple[str, ...] = ("x",)) -> Callable[[ModelProto], None]:
    return lambda p: p.graph.node.append(helper.make_node("Relu", list(inputs), list(outputs), name="bad"))


def sparse_attribute(proto: ModelProto) -> None:
    sparse = helper.make_sparse_tensor(
        helper.make_tensor("v", 1, [1], [1.0]), helper.make_tensor("i", 7, [1], [0]), [4]
    )
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], name="bad", sparse_value=sparse))


def recursive(proto: ModelProto) -> None:
    body = [helper.make_node("F", ["a"], ["b"], domain="d")]
    proto.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, [helper.make_opsetid("d", 1)]))


def bomb(proto: ModelProto) -> None:
    imports = [helper.make_opsetid("d", 1), helper.make_opsetid("", 17)]
    for i in range(24):
        call = (f"F{i + 1}", "d") if i < 23 else ("Relu", "")
        body = [helper.make_node(call[0], [a], [b], domain=call[1]) for a, b in (("a", "m"), ("m", "b"))]
        proto.functions.append(helper.make_function("d", f"F{i}", ["a"], ["b"], body, imports))
    proto.graph.node.append(helper.make_node("F0", ["x"], ["boom"], domain="d"))


UNSOUND: dict[str, tuple[Callable[[ModelProto], object], tuple[str, ...]]] = {
    "no graph": (lambda p: p.ClearField("graph"), ("no graph",)),
    "no opset": (lambda p: p.ClearField("opset_import"), ("no opset_import",)),
    "no ir version": (lambda p: p.ClearField("ir_version"), ("IR version",)),
    "training": (lambda p: p.training_info.add(), ("training_info",)),
    "sparse initializer": (
        lambda p: p.graph.sparse_initializer.add().values.CopyFrom(helper.make_tensor("S", 1, [1], [1.0])),
        ("'S'", "dense"),
    ),
    "sparse attribute": (sparse_attribute, ("'bad'", "dense")),
    "huge dims": (change(dims=[2**20, 2**20]), ("'W'", str(4 * 2**40), "8192")),
    "overflowing dims": (change(dims=[2**62, 2**62]), ("'W'",)),
    "negative dim": (change(dims=[-64, -32]), ("'W'", "negative")),
    "short raw_data": (change(raw_data=b"\0" * 100), ("'W'", "100")),
    "long raw_data": (change(raw_data=b"\0" * 8193), ("'W'", "8193")),
    "no data": (lambda p: p.graph.initializer[0].ClearField("raw_data"), ("'W'", "2048 numbers")),
    "no type": (lambda p: p.graph.initializer[0].ClearField("data_type"), ("'W'", "data type 0")),
    "type 99": (change(data_type=99), ("'W'", "data type 99")),
    "nameless initializer": (change(name=""), ("no name",)),
    "twin initializer": (lambda p: p.graph.initializer.append(p.graph.initializer[0]), ("'W'", "twice")),
    "output made twice": (add_node("y"), ("'bad'", "'y'")),
    "output over initializer": (add_node("W"), ("'bad'", "'W'")),
    "undefined input": (add_node("q", inputs=("nowhere",)), ("'bad'", "'nowhere'")),
    "cycle": (add_node("q", inputs=("q",)), ("'bad'", "'q'")),
    "undefined output": (lambda p: p.graph.output.add(name="ghost"), ("'ghost'",)),
    "recursion": (recursive, ("'F'", "calls itself")),
    "function bomb": (bomb, ("expand to",)),
    "function twice": (lambda p: [recursive(p), recursive(p)], ("'F'", "twice")),
    "untyped attribute": (lambda p: p.graph.node[0].attribute.add(name="a", i=1), ("'a'", "no type")),
    "map type": (
        lambda p: p.graph.input.add(name="mm").type.map_type.MergeFrom(onnx.TypeProto.Map(key_type=7)),
        (),
    ),
    "external in memory": (
        lambda p: onnx.external_data_helper.set_external_data(p.graph.initializer[0], "w.data"),
        ("'W'", "memory"),
    ),
}


@pytest.mark.parametrize("case", UNSOUND)
def test_unsound_models_are_refused(case: str) -> None:
    edit, words = UNSOUND[case]
    proto = tiny()
    edit(proto)
    start = time.perf_counter()
    refused(proto, *words)
    assert time.perf_counter() - start < 2  # nothing is expanded or allocated to find out


def test_unsound_subgraphs_are_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Relu", ["W"], ["t"])],
        "b",
        [],
        [helper.make_tensor_value_info("t", 1, None)],
        [TensorProto(name="inner", dims=[2**40], data_type=1)],
    )
    proto = tiny(c=np.array(True))
    proto.graph.node.append(helper.make_node("If", ["c"], ["u"], then_branch=branch, else_branch=branch))
    refused(proto, "'inner'")
    for b in proto.graph.node[-1].attribute:
        del b.g.initializer[:]
    assert room.read(proto).ir.graph.num_nodes() == 2


def test_bad_files_are_refused(tmp_path: Path) -> None:
    good = tiny().SerializeToString()
    files = {
        "empty": b"",
        "text": b"hello, this is not a model\n" * 9,
        "html": b"<!DOCTYPE html><html></html>",
    }
    files |= {f"cut{n}": good[:n] for n in (1, 7, 100, len(good) // 2, len(good) - 1)}
    files["utf8"] = good.replace(b"\x02mm", b"\x02\xff\xfe")
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, str(tmp_path / name))
    refused(tmp_path / "missing", "does not exist")
    refused(tmp_path, "folder")
    refused(tmp_path / "empty" / "below", "cannot be read")
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "regular")
    with (tmp_path / "big").open("wb") as f:
        f.truncate(2**31)
    refused(tmp_path / "big", "2 GB")


@settings(max_examples=150, deadline=None)
@given(at=st.integers(0, 8300), junk=st.binary(min_size=1, max_size=4))
@example(at=30, junk=b"\x80")  # the graph's name, no longer UTF-8, which protobuf hands out as bytes
def test_damaged_bytes_are_refused_or_read(at: int, junk: bytes) -> None:
    """Whatever a damaged file holds, the answer is a model or one sentence."""
    content = bytearray(tiny().SerializeToString())
    at %= len(content)
    content[at : at + len(junk)] = junk
    try:
        proto = ModelProto.FromString(bytes(content))
    except Exception:  # protobuf's own verdict; test_bad_files_are_refused covers that path
        return
    try:
        room.serialize(room.read(proto))
    except ModelError as e:
        assert e.message.endswith(".")


# External data


def set_entry(path: Path, key: str, value: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    for entry in proto.graph.initializer[0].external_data:
        if entry.key == key:
            entry.value = value
    path.write_bytes(proto.SerializeToString())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("location", "../m.data"),
        ("location", "sub/../../m.data"),
        ("location", "/etc/passwd"),
        ("location", "/dev/zero"),
        ("location", "C:\\m.data"),
        ("location", "..\\m.data"),
        ("location", ""),
        ("location", "gone.data"),
        ("location", "link"),
        ("location", "dirlink/secret"),
        ("location", "loop"),
        ("location", "hard"),
        ("location", "fifo"),
        ("location", "sub"),
        ("offset", "1"),
        ("offset", "-1"),
        ("offset", "99999999999999999999"),
        ("offset", "many"),
        ("length", "8191"),
        ("length", "8193"),
        ("length", "-8192"),
    ],
)
def test_bad_external_data_is_refused(tmp_path: Path, key: str, value: str) -> None:
    path = external(tmp_path / "m")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"\0" * 8192)
    (tmp_path / "m.data").write_bytes(b"\0" * 8192)
    (path.parent / "link").symlink_to(outside / "secret")
    (path.parent / "dirlink").symlink_to(outside)
    (path.parent / "loop").symlink_to("loop")
    (path.parent / "sub").mkdir()
    (path.parent / "hard").hardlink_to(outside / "secret")
    os.mkfifo(path.parent / "fifo")
    set_entry(path, key, value)
    refused(path, "'W'")


def test_external_data_is_read_lazily_and_counted_once(tmp_path: Path) -> None:
    proto = tiny(V=np.ones((100, 100), np.float32))
    path = external(tmp_path / "sub folder", proto)
    data = path.with_name("m.data")
    before = listing(path.parent)
    model = room.read(path)
    assert model.external
    assert model.nbytes == path.stat().st_size + data.stat().st_size
    assert model.sha256 == draft.sha256_of(path, data)
    np.testing.assert_array_equal(weight(model, "V"), np.ones((100, 100)))
    assert not weight(model).flags.writeable
    assert listing(path.parent) == before
    (path.parent / "inner").symlink_to("m.data")
    set_entry(path, "location", "inner")
    np.testing.assert_array_equal(weight(room.read(path)), weight(model))


def test_many_external_tensors_need_one_mapping(tmp_path: Path) -> None:
    path = external(tmp_path, tiny(**{f"v{i}": np.full(3, i, np.float32) for i in range(1500)}))
    model = room.read(path)
    held = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
    assert all(weight(model, f"v{i}")[0] == i for i in range(1500))
    assert held < 200


def hub(root: Path) -> Path:
    """Lay a model out as the Hugging Face cache does."""
    made = external(root / "made", name="model.onnx", data="model.onnx_data")
    snapshot = root / "models--o--n" / "snapshots" / "abc" / "onnx"
    blobs = root / "models--o--n" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, name in enumerate(("model.onnx", "model.onnx_data")):
        (made.parent / name).rename(blobs / f"{i:064}")
        (snapshot / name).symlink_to(Path("../../../blobs") / f"{i:064}")
    return snapshot / "model.onnx"


def test_hugging_face_cache_loads_and_links_out_of_it_do_not(tmp_path: Path) -> None:
    path = hub(tmp_path)
    assert weight(room.read(path)).shape == (64, 32)
    data = path.with_name("model.onnx_data")
    content = data.read_bytes()
    data.unlink()
    (tmp_path / "secret").write_bytes(content)
    data.symlink_to(tmp_path / "secret")
    refused(path, "'W'", "leads out")
    data.unlink()
    blobs = path.parents[3] / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    data.symlink_to(blobs / f"{1:064}")
    refused(path, "'W'", "leads out")


def test_a_link_to_a_model_finds_the_data_beside_its_target(tmp_path: Path) -> None:
    path = external(tmp_path / "real")
    (tmp_path / "link.onnx").symlink_to(path)
    assert weight(room.read(tmp_path / "link.onnx")).shape == (64, 32)


# Writing


def test_write_leaves_only_its_outputs_and_is_deterministic(tmp_path: Path) -> None:
    source = external(tmp_path / "in", tiny(V=np.ones((40, 40), np.float32)))
    before = listing(source.parent)
    files = []
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        model = room.read(source)
        size = room.output_size(model, target=folder / "out.onnx")
        file = room.write(model, folder / "out.onnx")
        files.append(listing(folder))
        assert len(files[-1]) == 2
        assert sum(map(len, files[-1].values())) == size == file.nbytes
        again = room.read(folder / "out.onnx")
        assert (again.sha256, again.nbytes) == (file.sha256, file.nbytes)
        np.testing.assert_array_equal(weight(again), weight(model))
    assert files[0] == files[1]
    assert listing(source.parent) == before
    ort.InferenceSession(tmp_path / "a" / "out.onnx", providers=["CPUExecutionProvider"])
    onnx.checker.check_model(tmp_path / "a" / "out.onnx", full_check=True)


@given(sizes=st.lists(st.integers(256, 1 << 16), min_size=1, max_size=4), noted=st.booleans())
@example(sizes=[(1 << 21) // 4, (1 << 14) // 4 - 8], noted=True)
@settings(max_examples=40, deadline=None)
def test_bytes_are_counted_without_the_numbers(sizes: list[int], noted: bool) -> None:
    """Lengths take one byte more from 2^7, 2^14 and 2^21 on, in the tensor, in the graph and in the model."""
    proto = tiny(**{f"W{k}": np.ones(n, np.float32) for k, n in enumerate(sizes)})
    proto.graph.initializer[-1].doc_string = "told" if noted else ""
    model = room.read(proto)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draft, "_LARGE", 1024)
        counted = room.output_size(model)
    assert counted == room.serialize(model).ByteSize()


def test_inline_stays_inline_and_large_goes_external(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = room.read(tiny())
    file = room.write(model, tmp_path / "in.onnx")
    assert set(listing(tmp_path)) == {"in.onnx"}
    assert file.nbytes == room.output_size(model)
    assert file.sha256 == draft.sha256_of(tmp_path / "in.onnx")
    monkeypatch.setattr(draft, "INLINE_LIMIT", 1000)
    file = room.write(model, tmp_path / "ex.onnx")
    assert len(listing(tmp_path)) == 3
    assert file.nbytes == room.output_size(model, target=tmp_path / "ex.onnx")
    with pytest.raises(ModelError, match="over 2 GB"):
        room.serialize(model)


def test_tied_external_weights_stay_tied(tmp_path: Path) -> None:
    path = external(tmp_path, tiny(V=np.zeros((64, 32), np.float32)))
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[1].external_data[:]
    proto.graph.initializer[1].external_data.extend(proto.graph.initializer[0].external_data)
    path.write_bytes(proto.SerializeToString())
    room.write(room.read(path), tmp_path / "out.onnx")
    (data,) = tmp_path.glob("out.onnx.*.data")
    assert data.stat().st_size == 64 * 32 * 4
    again = room.read(tmp_path / "out.onnx")
    np.testing.assert_array_equal(weight(again), weight(again, "V"))


def test_overwriting_replaces_the_data_file_and_the_source(tmp_path: Path) -> None:
    source = external(tmp_path)
    target = tmp_path / "out.onnx"
    model = room.read(source)
    room.write(model, target)
    first = set(listing(tmp_path))
    with pytest.raises(UsageError, match="--overwrite"):
        room.write(model, target)
    assert set(listing(tmp_path)) == first
    own = room.read(target)  # now the target is the source
    expected = weight(own).copy()
    own.ir.graph.initializers["W"].const_value = ir.tensor(expected * 2, name="W")
    room.write(own, target, overwrite=True)
    second = set(listing(tmp_path))
    assert len(second) == len(first)
    assert second != first
    np.testing.assert_array_equal(weight(room.read(target)), expected * 2)
    np.testing.assert_array_equal(weight(model), expected)
    room.write(room.read(tiny()), target, overwrite=True)
    assert set(listing(tmp_path)) == {"m.onnx", "m.data", "out.onnx"}


def test_a_stranger_s_data_file_is_never_removed(tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    (tmp_path / "out.onnx.01234567.data").write_bytes(b"mine")
    room.write(room.read(external(tmp_path / "in")), target)
    room.write(room.read(tiny()), target, overwrite=True)
    assert set(listing(tmp_path)) == {"out.onnx", "out.onnx.01234567.data"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ModelError])
def test_a_failed_check_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    model = room.read(external(tmp_path / "in"))
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    seen = []

    def check(path: Path) -> None:
        seen.append(weight(room.read(path)).copy())
        raise error("no.")

    with pytest.raises(error):
        room.write(model, target, check=check)
    assert not list(target.parent.iterdir())
    np.testing.assert_array_equal(seen[0], weight(model))
    room.write(model, target)
    before = listing(target.parent)
    model.ir.graph.initializers["W"].const_value = ir.tensor(np.zeros((64, 32), np.float32))
    with pytest.raises(error):
        room.write(model, target, overwrite=True, check=check)
    assert listing(target.parent) == before


def test_an_interruption_between_the_two_moves_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = room.read(external(tmp_path / "in"))
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    room.write(model, target)
    before = listing(target.parent)
    model.ir.graph.initializers["W"].const_value = ir.tensor(np.zeros((64, 32), np.float32))
    replace = Path.replace

    def interrupted(self: Path, to: Path) -> Path:
        if to == target:
            raise KeyboardInterrupt
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        room.write(model, target, overwrite=True)
    assert listing(target.parent) == before
    assert len(list(target.parent.iterdir())) == len(before)


def test_bad_targets_are_refused(tmp_path: Path) -> None:
    model = room.read(tiny())
    with pytest.raises(ModelError, match="is a folder"):
        room.write(model, tmp_path, overwrite=True)
    with pytest.raises(ModelError, match="not an existing folder"):
        room.write(model, tmp_path / "no" / "out.onnx")
    with pytest.raises(ModelError, match="not a regular file"):
        room.write(model, Path("/dev/null"), overwrite=True)
    with pytest.raises(SetupError, match="cannot be written"):
        room.write(model, tmp_path / ("x" * 300))
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(UsageError):
        room.write(model, tmp_path / "dangling")
    assert {p.name for p in tmp_path.iterdir()} == {"dangling"}


@pytest.mark.skipif(
    not Path("/proc/self").exists(), reason="needs Linux's /proc, which not even root can write"
)
def test_an_unwritable_folder_is_a_setup_error() -> None:
    with pytest.raises(SetupError, match="cannot be written"):
        room.write(room.read(tiny()), Path("/proc/self/out.onnx"))


def run(code: str, *args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("inline", [True, False])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, inline: bool) -> None:
    """peers.md 2.33: with RLIMIT_FSIZE others replace the good file by garbage."""
    proto = tiny(V=np.ones((300, 300), np.float32))
    source = saved(tmp_path, proto) if inline else external(tmp_path / "in", proto)
    out = tmp_path / "out"
    out.mkdir()
    old = saved(out, tiny(), "out.onnx").read_bytes()
    child = run(
        """
        import resource, signal, sys
        from pathlib import Path
        from onnxdp import model
        from onnxdp.errors import SetupError
        m = model.read(sys.argv[1])
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            model.write(m, Path(sys.argv[2]), overwrite=True)
        except SetupError as e:
            print(e.message)
        """,
        source,
        out / "out.onnx",
    )
    stdout, stderr = child.communicate(timeout=60)
    assert "disk is full" in stdout, stderr
    assert listing(out) == {"out.onnx": old}
    assert len(list(out.iterdir())) == 1


KILLED = """
import sys
from pathlib import Path
import numpy as np, onnx_ir as ir
from onnxdp import model
m = model.read(sys.argv[1])
print("ready", flush=True)
for i in range(10**6):
    m.ir.graph.initializers["W"].const_value = ir.tensor(np.full((64, 32), i, np.float32), name="W")
    m.ir.graph.initializers["V"].const_value = ir.tensor(np.full((64, 32), i, np.float32), name="V")
    model.write(m, Path(sys.argv[2]), overwrite=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_at_any_moment_the_file_is_whole(tmp_path: Path, how: signal.Signals) -> None:
    """peers.md 2.33: old or new, never a mix, and the next run clears what was left."""
    source = external(tmp_path / "in", tiny(V=np.zeros((64, 32), np.float32)))
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    room.write(room.read(source), target)
    rng = random.Random(0)
    for _ in range(6):
        child = run(KILLED, source, target)
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.0, 0.15))
        finally:
            child.send_signal(how)
            child.communicate(timeout=60)
        model = room.read(target)
        if not np.array_equal(weight(model), weight(room.read(source))):
            np.testing.assert_array_equal(weight(model), weight(model, "V"))
            assert len(np.unique(weight(model))) == 1
        if how == signal.SIGINT:
            assert not list(target.parent.glob(".onnxdp-*"))
    room.write(room.read(source), target, overwrite=True)
    names = {p.name for p in target.parent.iterdir()}
    assert len(names) == 2, names


def test_what_a_kill_between_the_two_moves_leaves_is_cleared(tmp_path: Path) -> None:
    source = external(tmp_path / "in")
    target = tmp_path / "out" / "out.onnx"
    target.parent.mkdir()
    room.write(room.read(tiny()), target)
    child = run(
        """
        import os, signal, sys
        from pathlib import Path
        from onnxdp import model
        target, replace = Path(sys.argv[2]), Path.replace
        def killed(self, to):
            if to == target:
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, to)
        Path.replace = killed
        model.write(model.read(sys.argv[1]), target, overwrite=True)
        """,
        source,
        target,
    )
    child.communicate(timeout=60)
    assert child.returncode == -signal.SIGKILL
    assert len(list(target.parent.iterdir())) == 3  # the old model, the new data, the room
    assert not room.read(target).external
    room.write(room.read(tiny()), target, overwrite=True)
    assert [p.name for p in target.parent.iterdir()] == ["out.onnx"]


def test_a_living_run_s_room_is_left_alone(tmp_path: Path) -> None:
    model = room.read(tiny())
    target = tmp_path / "out.onnx"

    def check(_: Path) -> None:
        (folder,) = tmp_path.glob(".onnxdp-*")
        room.write(model, target)
        assert folder.exists()

    room.write(model, target, overwrite=True, check=check)
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]
