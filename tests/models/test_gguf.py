"""The GGUF container against the `gguf` package, and every way a file can be wrong."""

import struct

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize

from tests.models import ggml_blocks
from turboquant_jax.models.checkpoint import packaged_smollm2
from turboquant_jax.models.gguf import open_gguf


@pytest.fixture
def path(tmp_path):
    """One key of every type and tensors of several, written by the package."""
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -100)
    writer.add_uint16("u16", 60_000)
    writer.add_int16("i16", -30_000)
    writer.add_uint32("u32", 4_000_000_000)
    writer.add_int32("i32", -2_000_000_000)
    writer.add_float32("f32", 0.5)
    writer.add_bool("truth", True)
    writer.add_string("text", "é")
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**62))
    writer.add_float64("f64", 0.1)
    writer.add_array("ints", [1, -2, 3])
    writer.add_array("floats", [0.5, 1.5])
    writer.add_array("texts", ["a", "", "ö"])
    rng = np.random.default_rng(0)
    writer.add_tensor("single", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("half", rng.normal(size=(7,)).astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        blocks = gguf.quants.quantize(rng.normal(size=(2, 4, 64)).astype(np.float32), kind)
        writer.add_tensor(kind.name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def assert_equals_the_package(path, names=None):
    file, reader = open_gguf(path), gguf.GGUFReader(path)
    fields = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == fields
    assert list(file.tensors) == [t.name for t in reader.tensors]
    for tensor in reader.tensors:
        assert file.shapes[tensor.name] == tuple(reversed(tensor.shape.tolist()))
        if names is None or tensor.name in names:
            expected = dequantize(tensor.data, tensor.tensor_type)
            got = file.read(tensor.name)
            assert got.dtype == np.float32
            np.testing.assert_array_equal(got, expected.reshape(got.shape))


def test_small_file_equals_the_package(path):
    assert_equals_the_package(path)


def test_smollm2_equals_the_package():
    names = {"blk.7.attn_k.weight", "blk.29.ffn_down.weight", "output_norm.weight"}
    assert_equals_the_package(packaged_smollm2(), names)


@pytest.mark.parametrize("alignment", [8, 256])
def test_data_starts_where_the_alignment_of_the_file_says(tmp_path, alignment):
    path = tmp_path / "aligned.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(alignment)
    for name in ("first", "second"):
        writer.add_tensor(name, np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    starts = [tensor.start for tensor in open_gguf(path).tensors.values()]
    assert all(start % alignment == 0 for start in starts)
    assert_equals_the_package(path)


def test_every_truncation_is_refused(path, tmp_path):
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    last = open_gguf(path).tensors["Q4_0"]
    needed = last.start + last.size  # the writer pads the end
    for length in range(needed):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{cut}: .*got.*expected"):
            open_gguf(cut)
    cut.write_bytes(whole[:needed])
    np.testing.assert_array_equal(open_gguf(cut).read("Q4_0"), open_gguf(path).read("Q4_0"))


def header(keys=b"", tensors=b"", *, magic=b"GGUF", version=3, counts=(0, 0)):
    return magic + struct.pack("<IQQ", version, counts[1], counts[0]) + keys + tensors + b"\0" * 99


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind, payload):
    return text(name) + struct.pack("<I", kind) + payload


def tensor(name="t", dims=(4,), kind=0, start=0):
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, start)


ONE = key("a", 0, b"\1")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "got an empty file, expected a GGUF file"),
        (header(magic=b"PK\3\4"), "got magic bytes b'PK.*', expected b'GGUF'"),
        (header(version=1), "got GGUF version 1, expected 2 or 3"),
        (header(version=3 << 24), "got GGUF version 50331648, expected 2 or 3, little endian"),
        (header(counts=(2**60, 0)), "truncated"),
        (header(counts=(0, 2**60)), "truncated|got shape"),
        (header(text(b"\xff"), counts=(1, 0)), "expected UTF-8"),
        (header(key("a", 13, b""), counts=(1, 0)), "a: got value type 13"),
        (header(key("a", 8, struct.pack("<Q", 2**62)), counts=(1, 0)), "truncated.*to hold a"),
        (header(key("a", 9, struct.pack("<IQ", 0, 2**62)), counts=(1, 0)), "truncated"),
        (header(key("a", 9, struct.pack("<IQ", 9, 1)), counts=(1, 0)), "a: got value type 9"),
        (header(ONE + ONE, counts=(2, 0)), "got key a twice"),
        (header(key("general.alignment", 4, b"\0" * 4), counts=(1, 0)), "got alignment 0"),
        (header(tensors=tensor(dims=(1,) * 5), counts=(0, 1)), "got 5 dimensions"),
        (header(tensors=tensor(dims=()), counts=(0, 1)), "got shape"),
        (header(tensors=tensor(dims=(0, 3)), counts=(0, 1)), r"got shape \(3, 0\)"),
        (header(tensors=tensor(kind=8), counts=(0, 1)), "expected rows of whole blocks of 32"),
        (header(tensors=tensor(kind=99), counts=(0, 1)), "got type 99, expected a GGML type"),
        (header(tensors=tensor() + tensor(), counts=(0, 2)), "got tensor t twice"),
        (header(tensors=tensor(start=2**40), counts=(0, 1)), "truncated.*for tensor t"),
        (header(tensors=tensor(dims=(2**62, 2**62)), counts=(0, 1)), "truncated.*for tensor t"),
    ],
)
def test_refusals(tmp_path, raw, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# Type -> function of a block's bytes, and where in the block lie the scales of 16 bits.
BLOCKS = {
    "BF16": (ggml_blocks.bf16, (0,)),
    "Q4_0": (ggml_blocks.q4_0, (0,)),
    "Q4_1": (ggml_blocks.q4_1, (0, 2)),
    "Q5_0": (ggml_blocks.q5_0, (0,)),
    "Q5_1": (ggml_blocks.q5_1, (0, 2)),
    "Q8_0": (ggml_blocks.q8_0, (0,)),
    "Q2_K": (ggml_blocks.q2_k, (80, 82)),
    "Q3_K": (ggml_blocks.q3_k, (108,)),
    "Q4_K": (ggml_blocks.q4_k, (0, 2)),
    "Q5_K": (ggml_blocks.q5_k, (0, 2)),
    "Q6_K": (ggml_blocks.q6_k, (208,)),
    "TQ1_0": (ggml_blocks.tq1_0, (52,)),
    "TQ2_0": (ggml_blocks.tq2_0, (64,)),
    "IQ4_NL": (ggml_blocks.iq4_nl, (0,)),
    "IQ4_XS": (ggml_blocks.iq4_xs, (0,)),
    "MXFP4": (ggml_blocks.mxfp4, ()),
    "NVFP4": (ggml_blocks.nvfp4, ()),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_values_of_every_type_of_block(tmp_path, name):
    """Random bytes, read as published: every nibble, sign and scale in its place."""
    kind = gguf.GGMLQuantizationType[name]
    values, scales = BLOCKS[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    raw = rng.integers(0, 256, (3, 4, size), np.uint8)
    for at in scales:  # finite, of either sign
        raw[..., at : at + 2] = rng.normal(size=(3, 4, 1)).astype(np.float16).view(np.uint8)
    if name == "MXFP4":
        raw[..., 0] = rng.integers(0, 250, (3, 4))  # 255 is NaN
    if name == "NVFP4":
        raw[..., :4] = rng.integers(0, 0x7F, (3, 4, 4))  # no sign; 0x7F is NaN
    path = tmp_path / "blocks.gguf"
    described = tensor(dims=(4 * block, 3), kind=int(kind))
    start = len(header(tensors=described, counts=(0, 1))) - 99
    path.write_bytes(
        header(tensors=described, counts=(0, 1))[:start] + bytes(-start % 32) + raw.tobytes()
    )
    got = open_gguf(path).read("t")
    expected = [[v for b in row for v in values(b.tobytes())] for row in raw]
    assert got.dtype == np.float32
    # An affine value is a difference of two of these sizes, each rounded to float32.
    np.testing.assert_allclose(got, np.array(expected), rtol=1e-6, atol=1e-4 * bool(scales[1:]))


def test_a_quantization_without_a_decoder_is_refused(tmp_path):
    path = tmp_path / "int.gguf"
    path.write_bytes(header(tensors=tensor(kind=int(gguf.GGMLQuantizationType.I32)), counts=(0, 1)))
    with pytest.raises(
        ValueError, match="tensor t: got I32, expected a type that the gguf package"
    ):
        open_gguf(path).read("t")
