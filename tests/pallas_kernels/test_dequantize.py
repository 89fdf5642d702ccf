"""Decoders against the packed layout, and their PTX against an emulator of its instructions."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.primitives import triton
from pallas_kernels.primitives.dequantize import PackedDecoder, lookup_assembly, lookup_codes
from pallas_kernels.primitives.gather import GatherDecoder, key_decoder, value_decoders
from pallas_kernels.primitives.narrow import (
    NarrowDecoder,
    NarrowTrellisDecoder,
    narrow_decoder,
)
from pallas_kernels.primitives.trellis import (
    SELECT,
    TrellisDecoder,
    half_table_assembly,
    half_table_codes,
    level_tables,
    own_word_assembly,
    quarter_table_codes,
    quarter_tables_assembly,
    subset_assembly,
)
from tests.layout import QUICK
from tests.pallas_kernels.blocks import levels_of, pack, random_codebook

MASK = 0xFFFFFFFF


def prmt(a, b, selectors):
    """PTX prmt.b32, default mode: four bytes of b:a, a selector's bit 3 replicates the sign."""
    source, out = b << 32 | a, 0
    for i in range(4):
        selector = selectors >> (4 * i) & 15
        byte = source >> (8 * (selector & 7)) & 255
        if selector & 8:
            byte = 255 * (byte >> 7)
        out |= byte << (8 * i)
    return out


def lop3(a, b, c, table):
    """PTX lop3.b32: bit by bit, entry 4 a + 2 b + c of the table."""
    out = 0
    for i in range(32):
        entry = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        out |= (table >> entry & 1) << i
    return out


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.b32": lambda a, b: a >> min(b, 32),
    "shl.b32": lambda a, b: a << min(b, 32) & MASK,
    "add.u32": lambda a, b: a + b & MASK,
    "prmt.b32": prmt,
    "lop3.b32": lop3,
}


def emulate(text, operands):
    """Runs a block of PTX; operands[i] is $(i + 1); answers $0."""
    registers = {f"${i + 1}": value for i, value in enumerate(operands)}
    for instruction in text.strip("{} ").split(";"):
        if not (instruction := instruction.strip()) or instruction.startswith(".reg"):
            continue
        name, rest = instruction.split(None, 1)
        target, *sources = [x.strip() for x in rest.split(",")]
        values = [registers[x] if re.match(r"[$a-z]", x) else int(x, 0) for x in sources]
        registers[target] = OPERATIONS[name](*values)
    return registers["$0"]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_assembly_equals_stand_in(bits):
    """Every variant, on random words: four bytes table[code] of the stand-in's four codes."""
    rng = np.random.default_rng(bits)
    decoder = PackedDecoder(random_codebook(rng, bits), 64, 1, unit=1)
    table = decoder.tables()["table"].view(np.uint32)
    entries = table.view(np.uint8)
    parts, groups = decoder.parts, decoder.variants // 2 // decoder.parts
    for part, group, half in np.ndindex(parts, groups, 2):
        text = lookup_assembly(bits, part, group, half)
        words = rng.integers(0, 2**32, (2 if bits == 3 else 1, 100), dtype=np.uint32)
        pair = [jnp.asarray(x) for x in words] + [None]
        codes = np.array(lookup_codes(pair[0], pair[1], bits, part, group, half))
        for given, expected in zip(words.T.tolist(), entries[codes].T.tolist(), strict=True):
            got = emulate(text, given + np.repeat(table, 4).tolist())
            assert [got >> (8 * i) & 255 for i in range(4)] == expected


def decode(decoder, codes):
    """Packs codes [rows, pages, length], decodes them: (levels [rows, columns], their places)."""

    @partial(jax.jit, compiler_options=QUICK)
    def run(planes, prepared, column):
        def fetch(plane, page, byte, mask):
            rows = planes[plane][:, page, jnp.minimum(byte, planes[plane].shape[-1] - 1)]
            return rows if mask is None else jnp.where(mask[None, :], rows, 0)

        return sum_of(decoder.operands(decoder.load(fetch), prepared)), decoder.elements(column)

    tables = decoder.tables()
    prepared = None if isinstance(decoder, PackedDecoder) else tables
    if isinstance(decoder, NarrowDecoder):
        shifts = {name: table[None] for name, table in tables.items() if name != "table"}
        prepared = shifts | {"table": None}
    with triton.interpreted():
        levels, places = run(
            pack(codes, decoder.codebook.widths), prepared, np.arange(decoder.columns)
        )
    return np.asarray(levels, np.int64) - decoder.centre, [np.asarray(x) for x in places]


def sum_of(operands):
    """Of int8 operands with their weights."""
    return sum(weight * x.astype(jnp.int32) for weight, x in operands)


@pytest.mark.parametrize(("bits", "length"), [(1, 32), (1, 64), (2, 16), (2, 32), (3, 32), (4, 16)])
def test_narrow_decoder_inverts_packing(bits, length):
    """Every element comes once, in the column that says so, with its level."""
    rng = np.random.default_rng(length + bits)
    book = random_codebook(rng, bits)
    decoder = key_decoder(book, length)
    assert isinstance(decoder, NarrowDecoder)
    codes = rng.integers(0, 2**bits, (5, 1, length))
    levels, (page, element, exists) = decode(decoder, codes)
    assert sorted(element.tolist()) == list(range(length)) and exists.all() and not page.any()
    np.testing.assert_array_equal(levels, np.array(book.levels)[codes[:, 0][:, element]])


@pytest.mark.parametrize(("bits", "length"), [(1, 16), (2, 8), (3, 16), (3, 64), (4, 8), (5, 32)])
def test_other_rows_are_not_narrow(bits, length):
    """Of 2 bytes, or of 16; or of two planes, or digits."""
    assert narrow_decoder(random_codebook(np.random.default_rng(0), bits), length) is None


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("length", "pages"), [(128, 1), (64, 2), (32, 2), (80, 1), (96, 1), (32, 1)]
)
def test_packed_decoder_inverts_packing(bits, length, pages):
    """Every element comes once, in the column that says so, with its level."""
    rng = np.random.default_rng(length + bits)
    book = random_codebook(rng, bits)
    codes = rng.integers(0, 2**bits, (5, pages, length))
    decoder = PackedDecoder(book, length, pages, book.widths[-1])
    levels, (page, element, exists) = decode(decoder, codes)
    place = (page * length + element)[exists]
    assert sorted(place.tolist()) == list(range(pages * length))
    want = np.array(book.levels)[codes].reshape(5, -1)[:, place]
    np.testing.assert_array_equal(levels[:, exists], want)


@pytest.mark.parametrize(("bits", "code"), [(1, "scalar"), (3, "scalar"), (2, "trellis")])
def test_rows_of_no_whole_words_are_gathered(bits, code):
    """Of 10 bytes: a look-up of the two last ones would take what other rows have."""
    book = random_codebook(np.random.default_rng(0), bits, code)
    assert isinstance(key_decoder(book, 80), GatherDecoder)
    assert not isinstance(key_decoder(book, 96), GatherDecoder)


def test_groups_of_values_share_one_order():
    """Codes of 2, 3, 4 and 6 bits side by side: one order of the tokens for all."""
    rng = np.random.default_rng(0)
    books = tuple(random_codebook(rng, bits) for bits in (4, 2, 3, 6))
    decoders = value_decoders(books, 64, 1)
    orders = jax.jit(lambda column: [d.elements(column) for d in decoders], compiler_options=QUICK)
    first, *others = orders(np.arange(64))
    for other in others:
        for x, y in zip(first, other, strict=True):
            np.testing.assert_array_equal(x, y)
    for decoder, book in zip(decoders, books, strict=True):
        assert isinstance(decoder, GatherDecoder) == (book.bits > 4)
        if book.bits <= 4:
            codes = rng.integers(0, 2**book.bits, (3, 1, 64))
            levels, (_, element, _) = decode(decoder, codes)
            np.testing.assert_array_equal(levels, np.array(book.levels)[codes[:, 0][:, element]])


def test_select_is_a_truth_table():
    """Of all three bits: the second where the first is one, the third elsewhere."""
    assert lop3(0b11110000, 0b11001100, 0b10101010, SELECT) == 0b11001010


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("given", [True, False])
def test_subsets_by_assembly(part, given):
    """Of random path bits of a row of 8 bytes, and of a column of rows: fields 2 c1 + c0."""
    shifts = [] if given else [part, 1 - part]
    rng = np.random.default_rng(part)
    path = rng.integers(0, 2, (20, 64))
    book = random_codebook(rng, 1, "trellis")
    want = levels_of(dataclasses.replace(book, levels=(0, 1, 2, 3)), path)
    words = pack(path, (1,))[0].copy().view(np.uint32).tolist()
    expected = pack(want, (2,))[0].reshape(20, 2, 2, 4)[:, part].copy().view(np.uint32)[..., 0]
    for row, fields in zip(words, expected.tolist(), strict=True):
        for i in range(2):
            first = MASK if i == 0 else 0
            text = subset_assembly(part if given else None, False)
            assert emulate(text, [row[i], row[1 - i], first, *shifts]) == fields[i]
    rows = [0, 0, 0, *rng.integers(0, 2**32, 20).tolist()]
    bits = (np.array(rows, np.uint64)[:, None] >> np.arange(32, dtype=np.uint64)).astype(int) & 1
    numbers = levels_of(dataclasses.replace(book, levels=(0, 1, 2, 3)), bits.T).T[:, part::2]
    for t in range(3, len(rows)):
        text = subset_assembly(part if given else None, True)
        got = emulate(text, rows[t - 3 : t + 1][::-1] + shifts)
        assert [got >> (2 * i) & 3 for i in range(16)] == numbers[t].tolist()


@pytest.mark.parametrize(("group", "half", "upper"), list(np.ndindex(2, 2, 2)))
def test_half_tables_by_assembly(group, half, upper):
    """The bytes of the half table where the code is of its half, else its sign."""
    rng = np.random.default_rng(3)
    table, _ = level_tables(random_codebook(rng, 3, "trellis"))
    tables = [int(t) & MASK for t in np.repeat(table[2 * upper : 2 * upper + 2], 4)]
    entries = table.view(np.int8)
    words = rng.integers(0, 2**32, (2, 100), dtype=np.uint32)
    found = np.array(half_table_codes(*map(jnp.asarray, words), group, half))
    for pair, codes in zip(words.T.tolist(), found.T.tolist(), strict=True):
        got = emulate(half_table_assembly(group, half, upper), [*pair, *tables])
        want = [int(entries[c]) if c // 8 == upper else upper - 1 for c in codes]
        assert [got >> (8 * i) & 255 for i in range(4)] == [x & 255 for x in want]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("half", [0, 1])
def test_subsets_of_a_path_of_one_word(part, half):
    """They are those of a row whose word before is itself, at the place of its copy."""
    for word in np.random.default_rng(0).integers(0, 2**32, 50).tolist():
        want = emulate(subset_assembly(part, False), [word, word, MASK])
        assert emulate(own_word_assembly(), [word, part, 1 - part, 16 * half]) == want >> 16 * half


@pytest.mark.parametrize(("part", "group", "half"), list(np.ndindex(2, 2, 2)))
def test_quarter_tables_by_assembly(part, group, half):
    """The byte of one of 32 entries: the first three bits of a code in one of four tables."""
    rng = np.random.default_rng(3)
    table = rng.integers(0, 2**32, 8, dtype=np.uint32)
    words = rng.integers(0, 2**32, (3, 100), dtype=np.uint32)
    found = np.array(quarter_table_codes(*map(jnp.asarray, words), part, group, half))
    assert found.min() == 0 and found.max() == 31
    for given, codes in zip(words.T.tolist(), found.T.tolist(), strict=True):
        text = quarter_tables_assembly(part, group, half)
        got = emulate(text, [*given, *np.repeat(table, 4).tolist()])
        assert [got >> (8 * i) & 255 for i in range(4)] == table.view(np.uint8)[codes].tolist()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("length", "rows"),
    [(128, False), (96, False), (64, True), (128, True), (64, False), (32, False)],
)
def test_trellis_decoders_follow_the_path(bits, length, rows):
    """Along the columns of a key, and along the rows of values."""
    rng = np.random.default_rng(length + bits)
    book = random_codebook(rng, bits, "trellis")
    decoder = value_decoders((book,), length, 1)[0] if rows else key_decoder(book, length)
    assert isinstance(decoder, NarrowTrellisDecoder if length == 32 else TrellisDecoder)
    codes = rng.integers(0, 2**bits, (19, length))

    @partial(jax.jit, compiler_options=QUICK)
    def run(planes, prepared, column):
        def fetch(plane, page, byte, mask, back=0):
            del page
            bytes_ = jnp.pad(planes[plane], ((back, 0), (0, 0)))[: codes.shape[0]]
            found = bytes_[:, jnp.minimum(byte, bytes_.shape[1] - 1)]
            return found if mask is None else jnp.where(mask[None, :], found, 0)

        return sum_of(decoder.operands(decoder.load(fetch), prepared)), decoder.elements(column)

    tables = decoder.tables()
    prepared = {name: x if name == "table" else x[None, :] for name, x in tables.items()}
    with triton.interpreted():
        got, (_, *places) = run(pack(codes, book.widths), prepared, np.arange(decoder.columns))
    got, element, exists = (np.asarray(x) for x in (got, *places))
    want = levels_of(book, codes.T).T if rows else levels_of(book, codes)
    assert sorted(element[exists].tolist()) == list(range(length))
    np.testing.assert_array_equal(got[:, exists], want[:, element[exists]])
