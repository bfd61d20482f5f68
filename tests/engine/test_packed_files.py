"""Files of packed encoders: whole, what contradicts itself, damaged, half-written, no files at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from mutations import assert_refused_or_same, cut, edited, flipped
from packed import metadata_of, rewrite
from safetensors.torch import load_file, save_file
from tiny_encoder import MASK, V, make

from distilbert_fast.engine import packed_files
from distilbert_fast.engine.engine import Engine
from distilbert_fast.engine.packed_files import FORMAT
from distilbert_fast.files.durable import FileError

IDS = torch.arange(24).view(4, 6) % V


@pytest.fixture(scope="module")
def engine():
    engine = Engine.from_model(make(), "int8", torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
    return engine.calibrated([{"input_ids": IDS}])


@pytest.fixture
def path(engine, tmp_path):
    engine.save(tmp_path / "engine.safetensors")
    return tmp_path / "engine.safetensors"


def refused(path, **arguments):
    with pytest.raises(FileError) as error:
        Engine.load(path, **arguments)
    assert str(error.value).startswith("engine: ") and str(path) in str(error.value)
    return str(error.value).replace(repr(str(path)), "PATH")


def test_the_same_engine_makes_the_same_file(engine, path):
    first = path.read_bytes()
    engine.save(path)
    Engine.load(path).save(path)  # over the file that it is mapped from
    assert path.read_bytes() == first
    assert os.listdir(path.parent) == ["engine.safetensors"]


def test_files_without_a_checksum_keep_loading(engine, path):
    rewrite(path)
    assert torch.equal(Engine.load(path)(IDS, MASK), engine(IDS, MASK))
    assert refused(path, verify=True) == (
        "engine: PATH: expected a checksum to verify, got a file of an earlier version; save it again"
    )


def test_what_is_verified(engine, path, monkeypatch):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for verify in (None, True):
        assert "engine: PATH: its tensors do not fit their checksum: expected" in refused(path, verify=verify)
    monkeypatch.setattr(packed_files, "VERIFIED", 100)
    for verify in (None, False):
        Engine.load(path, verify=verify)
    content = path.read_bytes().replace(b"1e-12", b"1e-02", 1)  # in the header, which is always compared
    path.write_bytes(content)
    assert "engine: PATH: its header does not fit its checksum: expected" in refused(path)


NAN = float("nan")
WRONG_SHAPES = {
    "kinds": (
        [],
        [["int8"] * 4],
        [["int7"] * 4] * 2,
        [["fp32"] * 4] * 2,
        [["int8"] * 3] * 2,
        [["int8"] * 3, 8],
        None,
        ...,
    ),
    "dtype": ("int8", 8, None, ...),
    "hidden": (0, -1, 2**40, 30.0, "30", 31, True, ...),
    "head_size": (0, 9, 11, 2**62, ...),
    "num_heads": (0, 2, 4, None, ...),
    "ffn": (0, 37, [37], [37, 70], [0, 37], [-1, 37], [2**40, 37], [37.0, 37], [37] * 3, None, ...),
    "padding_idx": (-1, 20, 2**40, "0", ...),
    "heads": ([], [[1, 2]], [[1, 2], [0, 1, 3]], [[1, 2], [0, 1, 1]], [[1, 2], [0, 1]], [[1], [0, 1, 2]], 3, ...),
    "eps": ([], [1e-12] * 4, [1e-12] * 6, [NAN] * 5, [-1e-12] * 5, ["x"] * 5, [1e400] * 5, 1e-12, ...),
    "scales": ([], [[0, 0]], [[0.1, -0.1]] * 2, [[NAN, 0.1]] * 2, [[0.1]] * 2, [[0.1, 0.0]] * 2, None, ...),
    "more": (1,),
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG_SHAPES.items() for v in values])
def test_a_shape_that_cannot_be(field, value, path):
    rewrite(path, **{field: value})
    assert "\n" not in refused(path)


def test_messages(path):
    rewrite(path, head_size=9)
    assert refused(path) == "engine: PATH: shape: head_size must be 30 / 3, the share of a head, got 9"
    rewrite(path, head_size=10, eps=[NAN] * 5)
    assert refused(path) == "engine: PATH: shape: eps[0] must be a finite number from 0 on, got nan"
    rewrite(path, eps=[0.0] * 5, heads=[], ffn=[])
    assert refused(path) == "engine: PATH: shape: eps must be 1 for 0 layers, got 5"
    rewrite(path, eps=[0.0], scales=[], ffn=[], kinds=[])
    assert refused(path).startswith("engine: PATH: it holds what no layer uses: 0.attention_norm.bias, 0.attention_")


WRONG_TENSORS = {
    "word": (None, torch.zeros(V), torch.zeros(V, 29), torch.zeros(V, 30, dtype=torch.float16)),
    "token_type": (torch.zeros(2, 31), torch.zeros(2, 30, dtype=torch.int8)),
    "norm.weight": (None, torch.ones(29), torch.ones(30).bfloat16(), torch.full((30,), NAN), torch.ones(1, 30)),
    "0.qkv": (None, torch.zeros(5, dtype=torch.uint8), torch.zeros(30, 60)),
    "1.ffn_out": (None, torch.zeros(0, dtype=torch.uint8), torch.zeros(4000, dtype=torch.int8)),
    "0.mask": (torch.ones(1), torch.ones(3), torch.tensor([NAN, 1.0])),
    "1.ffn_factors": (None, torch.ones(37), torch.full((64,), float("inf"))),
    "2.qkv": (torch.zeros(5, dtype=torch.uint8),),
    "more": (torch.zeros(1),),
}


@pytest.mark.parametrize("name", WRONG_TENSORS)
def test_tensors_that_do_not_fit(name, path):
    whole = path.read_bytes()
    for tensor in WRONG_TENSORS[name]:
        rewrite(path, {name: tensor})
        assert name in refused(path)
        path.write_bytes(whole)


def test_bits_and_ends(engine, path):
    want, content = engine(IDS, MASK), path.read_bytes()

    def same(found):
        return torch.equal(found(IDS, MASK), want)

    damages = [*flipped(content, 0, 150), *cut(content, 1, 20)]
    assert assert_refused_or_same(path, iter(damages), lambda: Engine.load(path), same) == len(damages)


@pytest.mark.parametrize("seed", range(2))
def test_edited_shapes_of_files_without_a_checksum(seed, path):
    """Another eps or scale is as good as the old one, where there is no checksum."""
    tensors = load_file(path)
    metadata = metadata_of(path)
    edits = []
    for label, text in edited(json.loads(metadata["shape"]), seed, 150):
        changed = {"format": FORMAT, "shape": text.decode(errors="replace")}
        save_file(tensors, path, changed)
        edits.append((label, path.read_bytes()))

    def runs(found):
        return found(IDS, MASK).shape == (4, 6, 30)

    assert assert_refused_or_same(path, iter(edits), lambda: Engine.load(path), runs) > 130


def test_no_regular_file(path, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    kinds = {tmp_path / "fifo": "a FIFO", tmp_path: "a directory", "/dev/zero": "a device"}
    for place, kind in kinds.items():
        assert refused(place) == f"engine: PATH: expected a regular file, got {kind}"
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Engine.load(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(path)
    Engine.load(tmp_path / "link").save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()


def test_saving_where_that_cannot_be(engine, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for place in (tmp_path / "nowhere" / "engine", tmp_path / "fifo", tmp_path, "/dev/full"):
        with pytest.raises(OSError) as error:
            engine.save(place)
        assert str(place) in str(error.value)
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_full_disk(path):
    """A real write error: the process may write no file beyond 4096 bytes."""
    whole = path.read_bytes()
    program = f"""
    import resource
    from distilbert_fast.engine.engine import Engine
    engine = Engine.load({str(path)!r})
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    for name in ({str(path)!r}, {str(path.with_name("new"))!r}):
        try:
            engine.save(name)
        except OSError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        f"[Errno 27] File too large: {str(path.with_name(name))!r}" for name in ("engine.safetensors", "new")
    ], done.stderr
    assert path.read_bytes() == whole and os.listdir(path.parent) == ["engine.safetensors"]
