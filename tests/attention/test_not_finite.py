"""NaN, infinity and overflow: what goes in and is seen comes out as NaN, the same from everything.

Against a softmax in float64 over the decoded vectors: the same outputs are NaN, all others equal.
The rule is that of `attention.segments`.
"""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.decode_attention import PagedBlocks, Softmax, decode_attention
from pallas_kernels.primitives import triton
from tests import layout
from tests.layout import CODEC, QUICK, SMALL, decoded
from tests.marks import GPU
from tests.pallas_kernels.blocks import arrays
from tests.pallas_kernels.test_decode_attention import Case, make_call
from turboquant_jax import cache
from turboquant_jax.attention import attend, cudnn
from turboquant_jax.attention.teacher_forcing import teacher_forced
from turboquant_jax.cache import compression
from turboquant_jax.cache.choose import Compression
from turboquant_jax.cache.state import Exact, rows_of

SETTINGS = {
    "bfloat16": dict(key=CODEC(4), value=CODEC(4), dtype="bfloat16"),
    "groups": dict(
        key=CODEC(((16, 3), (16, 2))), value=CODEC(((16, 2), (16, 3)), "identity"), dtype="float32"
    ),
    "calibrated": dict(
        key=CODEC(((8, 4), (24, 2)), "block_hadamard", scales="joint"),
        value=CODEC(((16, 3), (8, 2), (8, 1)), scales="joint"),
        dtype="bfloat16",
    ),
    "prod": dict(key=CODEC(4, code="prod"), value=CODEC(3), dtype="bfloat16"),
    "trellis": dict(key=CODEC(2, code="trellis"), value=CODEC(3, code="trellis"), dtype="float16"),
}
SHAPE = dict(num_layers=2, num_kv_heads=2, head_dim=32, block=32, window=5, sinks=2)
LENGTHS = 0, 60, 109
BATCH, COUNT, HEADS, LAYER = 3, 3, 4, 1
ROW, HEAD, CHANNEL = 2, 1, 19  # of what is spoilt
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@lru_cache
def clean(name, window=None, count=COUNT):
    """A filled cache and a call, all finite, as a dictionary."""
    rng = np.random.default_rng(3)
    config = cache.CacheConfig(**SHAPE | SETTINGS[name], sliding_window=window)
    options = {"calibration": layout.calibration(config)}
    if name == "groups":
        every = np.tile(np.arange(32, dtype=np.int32), (2, 2, 1))
        options |= {f"{side}_order": rng.permuted(every, axis=-1) for side in ("key", "value")}
    make = lambda: cache.create(config, BATCH, 140, key=jax.random.key(2), **options)  # noqa: E731
    state = jax.jit(make, compiler_options=QUICK)()
    slots, pages = state.table.page_table.shape[1], state.table.references.shape[0]
    # page 0, which stands for those that are not there, is nobody's
    table = np.resize(1 + rng.permutation(pages - 1), (BATCH, slots))
    held = config.num_blocks(np.asarray(LENGTHS))[:, None]
    state = replace(state, **layout.random_parts(state, rng)).with_table(
        page_table=jnp.asarray(np.where(np.arange(slots) < held, table, -1), jnp.int32),
        lengths=jnp.asarray(LENGTHS, jnp.int32),
    )
    shapes = [(BATCH, count, n, 32) for n in (HEADS, 2, 2)]
    # exact in 16 bits, for kernels that take the query so
    q, k, v = (jnp.asarray(rng.normal(0, 1, s), config.dtype).astype(jnp.float32) for s in shapes)
    return dict(state=state, q=q, k=k, v=v, sinks=jnp.asarray([0.5, 1.0, -1.0, 2.0]))


def exact(call, segment, side, slot, to):
    """With a number in a key or value of the sinks or the window."""
    held = getattr(call["state"], segment)
    at = getattr(held, side).at[LAYER, ROW, slot, HEAD, CHANNEL]
    held = replace(held, **{side: at.set(to)})
    return call | dict(state=replace(call["state"], **{segment: held}))


def scaled(call, group, side, to):
    """With another scale of a compressed token."""
    state, page = call["state"], int(call["state"].table.page_table[ROW, 1])
    part, row = layout.row_of_head(state, LAYER, HEAD)
    half = int(np.asarray(to, jnp.bfloat16).view(np.uint16))
    scales = list(part.pool.scales)
    word = int(scales[group][row, page, 20])
    word = word & 0xFFFF0000 | half if side == "keys" else word & 0xFFFF | half << 16
    scales[group] = scales[group].at[row, page, 20].set(np.uint32(word))
    part = replace(part, pool=replace(part.pool, scales=tuple(scales)))
    return call | dict(state=replace(state, parts=(part,)))


def sketched(call, to):
    """With another norm of what the codes of a compressed key leave."""
    state, page = call["state"], int(call["state"].table.page_table[ROW, 1])
    part, row = layout.row_of_head(state, LAYER, HEAD)
    held = part.pool.sketches
    held = replace(held, norms=held.norms.at[row, page, 20].set(to))
    part = replace(part, pool=replace(part.pool, sketches=held))
    return call | dict(state=replace(state, parts=(part,)))


def new(call, name, token, head, to):
    return call | {name: call[name].at[ROW, token, head, CHANNEL].set(to)}


def mean(call, to):
    key_mean = call["state"].key_mean.at[LAYER, ROW, HEAD, CHANNEL].set(to)
    return call | dict(state=replace(call["state"], key_mean=key_mean))


def spoilt(call, token):
    """(name, call) with one thing in it that is not finite, or one score that overflows."""
    ring = call["state"].window.keys.shape[2]
    slot = (LENGTHS[ROW] - 1 - 2) % ring  # of the newest token in the window
    groups = range(len(call["state"].parts[0].pool.scales))
    for name, bad in BAD.items():
        yield f"query {name}", new(call, "q", token, 2 * HEAD, bad)
        yield f"new key {name}", new(call, "k", token, HEAD, bad)
        yield f"new value {name}", new(call, "v", token, HEAD, bad)
        for side in ("keys", "values"):
            yield f"sinks' {side} {name}", exact(call, "sinks", side, 1, bad)
            yield f"window's {side} {name}", exact(call, "window", side, slot, bad)
        yield f"mean {name}", mean(call, bad)
        yield f"sink logit {name}", call | dict(sinks=call["sinks"].at[3].set(bad))
    for side in ("keys", "values"):
        for group in groups:
            yield f"compressed {side} {group}", scaled(call, group, side, np.nan)
    if call["state"].parts[0].pool.sketches is not None:
        yield "compressed norm", sketched(call, np.nan)
        huge = new(call, "q", token, 2 * HEAD, 1e15)
        yield "overflow of the signs", sketched(huge, 1e30)
    # 16-bit floats do not reach so far
    if call["state"].config.dtype != "float16":
        for sign in (1, -1):
            large = new(call, "q", token, 2 * HEAD, sign * 1e15)
            yield f"overflow in the window {sign}", exact(large, "window", "keys", slot, 1e25)
            yield f"overflow in the blocks {sign}", scaled(large, 0, "keys", 1e30)
        large = new(call, "q", token, 2 * HEAD, 1e15)
        yield "overflow of the new token", new(large, "k", token, HEAD, 1e25)


@lru_cache
def expected_of_clean(name, count):
    """Of the sequences that nothing spoils, too."""
    return expected(clean(name), count, range(BATCH), np.zeros((BATCH, count, HEADS, 32)))


def expected(call, count, rows, others):
    """Output [B, count, N, H] in float64, of scores that overflow as those in float32 do."""
    state, found = call["state"], others.copy()
    k, v = (np.asarray(call[n].astype(state.config.dtype), np.float64) for n in ("k", "v"))
    q, sinks = (np.asarray(call[n], np.float64) for n in ("q", "sinks"))
    with np.errstate(all="ignore"):
        for row in rows:
            start = LENGTHS[row]
            edge = 2 + 32 * max(0, (start - 7) // 32)
            tokens = decoded(state, LAYER, row)
            tokens |= {start + t: [k[row, t], v[row, t]] for t in range(count)}
            for t, n in np.ndindex(count, HEADS):
                kept = [(p, *(x[n // 2] for x in kv)) for p, kv in tokens.items() if p <= start + t]
                keys = np.stack([whole(key) for _, key, _ in kept])
                values = [
                    whole(x) if 2 <= p < edge else np.where(np.isfinite(x), x, np.nan)
                    for p, _, x in kept
                ]
                logits = (keys @ whole(q[row, t, n]) * 32**-0.5).astype(np.float32)
                logits = np.append(logits.astype(np.float64), sinks[n])
                weights = np.exp(logits - np.max(logits))
                found[row, t, n] = (weights / weights.sum())[:-1] @ np.stack(values)
    return found


def whole(x):
    """A vector, NaN unless all of it is finite."""
    return x if np.isfinite(x).all() else np.full_like(x, np.nan)


def unseen(call):
    """NaN in everything that no query sees."""
    state, ring = call["state"], call["state"].window.keys.shape[2]
    sinks, window, mean = (np.ones(s, bool) for s in ((2, 3, 2), (2, 3, ring), (2, 3)))
    (part,) = state.parts
    scales = np.ones(part.pool.scales[0].shape, bool)
    for row, length in enumerate(LENGTHS):
        count = max(0, (length - 7) // 32)
        sinks[LAYER, row, : min(length, 2)] = False
        window[LAYER, row, [(p - 2) % ring for p in range(2 + 32 * count, length)]] = False
        mean[LAYER, row] = count == 0
        scales[2:4, np.asarray(state.table.page_table[row, :count])] = False

    def put(mask, x):
        return jnp.where(mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim)), jnp.nan, x)

    words = tuple(jnp.where(scales, jnp.uint32(0x7FC07FC0), x) for x in part.pool.scales)
    if (sketches := part.pool.sketches) is not None:
        sketches = replace(sketches, norms=put(scales, sketches.norms))
    state = replace(
        state,
        sinks=jax.tree.map(partial(put, sinks), state.sinks),
        window=jax.tree.map(partial(put, window), state.window),
        key_mean=put(mean, state.key_mean),
        parts=(replace(part, pool=replace(part.pool, scales=words, sketches=sketches)),),
    )
    return call | dict(state=state)


def by_definition(call):
    with jax.default_matmul_precision("highest"):
        arrays = (call[n] for n in ("q", "k", "v"))
        return attend(
            call["state"], LAYER, *arrays, sink_logits=call["sinks"], implementation="xla"
        )


def by_kernel(call):
    arrays = (call[n][:, :1] for n in ("q", "k", "v"))
    return attend(call["state"], LAYER, *arrays, sink_logits=call["sinks"], implementation="pallas")


def by_tiles(call, decode_by="xla"):
    arrays = tuple(call[n] for n in ("q", "k", "v"))
    rows = rows_of(call["state"], LAYER)
    scores = cudnn.Scores()
    return cudnn.attend(call["state"], rows, arrays, scores, call["sinks"], decode_by=decode_by)


def assert_follows(name, run, count, token, tolerance):
    """The rule holds for whatever is spoilt, and what is not seen changes no bit."""
    call = clean(name)
    whole_one = np.asarray(run(call))
    assert np.isfinite(whole_one).all()
    np.testing.assert_array_equal(np.asarray(run(unseen(call))), whole_one)
    some, others = 0, expected_of_clean(name, count)
    for what, bad in [("nothing", call), *spoilt(call, token)]:
        rows = range(BATCH) if what.startswith("sink logit") else [ROW]
        want, got = expected(bad, count, rows, others), np.asarray(run(bad), np.float64)
        nan = np.isnan(want)
        some += nan.any()
        assert nan.any() or what in ("nothing", "sink logit -inf") or what.startswith("overflow")
        if what.startswith("overflow"):  # far below all others: no share, or NaN of the whole head
            assert np.isnan(got)[nan].all()
            nan = nan | np.isnan(got).all(axis=-1, keepdims=True)
            own = got[ROW, token:, 2 * HEAD : 2 * HEAD + 2]
            assert np.isnan(got).sum() == np.isnan(own).sum()
        np.testing.assert_array_equal(np.isnan(got), nan, err_msg=what)
        assert not nan.all()
        want, got = (np.where(nan, 0, x) for x in (want, got))
        error = np.linalg.norm(got - want, axis=-1)
        assert np.all(error <= tolerance * np.maximum(np.linalg.norm(want, axis=-1), 1)), what
    assert some > 20


@pytest.mark.parametrize("name", SETTINGS)
def test_of_the_definition(name):
    assert_follows(name, jax.jit(by_definition, compiler_options=QUICK), COUNT, 1, 1e-4)


@pytest.mark.parametrize(
    ("name", "interpret"),
    [
        *((name, True) for name in SETTINGS if name != "bfloat16"),  # prod's values are so coded
        *(pytest.param(name, False, marks=GPU) for name in SETTINGS),
    ],
)
def test_of_the_decode_kernel(name, interpret):
    with triton.interpreted(interpret):
        assert_follows(name, jax.jit(by_kernel), 1, 0, 4e-3)


@pytest.mark.parametrize(
    ("name", "vendor"),
    [
        # no float16 on a CPU; one scalar code is looked at behind a window
        *((n, "xla") for n in SETTINGS if n not in ("trellis", "bfloat16")),
        *(pytest.param(n, "cudnn", marks=GPU) for n in SETTINGS if n != "groups"),
    ],
)
def test_of_tiles_by_the_vendor(name, vendor, monkeypatch):
    monkeypatch.setattr(cudnn, "VENDOR", vendor)
    monkeypatch.setattr(cudnn, "TILE", 64)  # of which a sequence may have half
    served = vendor == "cudnn" and name != "prod"
    run = partial(by_tiles, decode_by="pallas" if served else "xla")
    with jax.numpy_dtype_promotion("standard"):  # the vendor is "xla" here, which mixes dtypes
        # a transform that is not orthogonal magnifies the rounding of what it is applied to
        assert_follows(name, jax.jit(run), COUNT, 1, 4e-2 if name == "calibrated" else 2e-2)


def spoilt_at(call, length, window):
    """(name, call, what it spoils): one thing that is not finite, seen by all, some or no queries.

    What is spoilt is the position of what must be seen for it, and which channels.
    """
    ring = call["state"].window.keys.shape[2]
    edge, own = 2 + 32 * max(0, (length - 7) // 32), slice(CHANNEL, CHANNEL + 1)
    for side, channels in (("keys", slice(None)), ("values", own)):
        yield f"sinks' {side}", exact(call, "sinks", side, 1, np.nan), 1, channels
        for position in {edge, length - 1}:
            slot = (position - 2) % ring
            bad = exact(call, "window", side, slot, np.nan)
            yield f"window's {side} {position}", bad, position, channels
        # token 20 of slot 1, which has block 1 of the longer sequence, and none of the other
        position = 2 + 32 + 20 if edge > 2 + 32 else -window
        yield f"block's {side}", scaled(call, 0, side, np.nan), position, slice(None)
        for token in (0, 1, 57):
            bad = new(call, side[0], token, HEAD, np.inf)
            yield f"new {side} {token}", bad, length + token, channels
    yield "mean", mean(call, np.nan), edge - 1, slice(None)


# Behind 109 tokens the first query alone sees token 20 of block 1, and none a sink; behind 40 some
# see sinks. Of the chunk's own tokens, which are more than the window, the last ones see but some.
@pytest.mark.parametrize("length", [109, 40])
@pytest.mark.parametrize("vendor", [None, "xla", pytest.param("cudnn", marks=GPU)])
def test_behind_a_window(vendor, length, monkeypatch):
    """Of the definition, and of the vendor's attention."""
    window, count = 56, 60
    monkeypatch.setattr(cudnn, "VENDOR", vendor)
    call = clean("bfloat16", window, count)
    lengths = call["state"].lengths.at[ROW].set(length)
    call = call | dict(state=call["state"].with_lengths(lengths))
    by = partial(by_tiles, decode_by="pallas" if vendor == "cudnn" else "xla")
    run = jax.jit(by_definition if vendor is None else by, compiler_options=QUICK)
    with jax.numpy_dtype_promotion("standard"):  # the vendor is "xla" here, which mixes dtypes
        whole_one = np.asarray(run(call))
        assert np.isfinite(whole_one).all()
        if length == LENGTHS[ROW]:
            np.testing.assert_array_equal(np.asarray(run(unseen(call))), whole_one)
        query, some = length + np.arange(count), set()
        for name, bad, position, channels in spoilt_at(call, length, window):
            want = whole_one.copy()
            seen = (position <= query) & (position > query - window)
            want[ROW, seen, 2 * HEAD : 2 * HEAD + 2, channels] = np.nan
            some.add(int(seen.sum()))
            np.testing.assert_array_equal(np.asarray(run(bad)), want, err_msg=name)
    assert len(some) > 4


def test_of_teacher_forcing():
    """Decoding token by token, which is the definition's, gives NaN in the same places."""
    config = cache.CacheConfig(**SMALL | dict(head_dim=16, key=CODEC(6), value=CODEC(7)))
    q, k, v = layout.random_tokens(config, 40, 4)
    empty = layout.empty_cache(config, 2)
    # a sink, the first block, a later one, the window: in row 1 and of both layers
    k = k.at[:, 1, 4, 0, 2].set(jnp.nan).at[:, 1, 6, 1, 3].set(jnp.inf)
    v = v.at[:, 1, 13, 0, 2].set(jnp.nan).at[:, 1, 20, 1, 3].set(-jnp.inf)
    q = q.at[0, 11, 3, 1].set(jnp.inf)
    v = v.at[:, 0, 1, 1, 5].set(jnp.nan).at[:, 0, 38, 0, 5].set(jnp.nan)

    def step(state, xs):
        q, k, v = xs  # of one token [B, ...], k and v of all layers
        out = attend(state, 1, q[:, None], k[1][:, None], v[1][:, None])
        return cache.append(state, k[:, :, None], v[:, :, None]), out[:, 0]

    tokens = (jnp.moveaxis(q, 1, 0), jnp.moveaxis(k, 2, 0), jnp.moveaxis(v, 2, 0))
    run = jax.jit(lambda state: jax.lax.scan(step, state, tokens), compiler_options=QUICK)
    final, out = run(empty)
    chunk = jax.jit(cache.append, compiler_options=QUICK)(empty, k, v)
    for one, other in zip(jax.tree.leaves(final), jax.tree.leaves(chunk), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    force = jax.jit(teacher_forced, static_argnums=1, compiler_options=QUICK)
    forced, out = np.asarray(force(empty, 1, q, k[1], v[1])), np.moveaxis(np.asarray(out), 0, 1)
    np.testing.assert_allclose(out, forced, rtol=0, atol=1e-5, equal_nan=True)
    bad = np.isnan(forced)
    assert not bad[1, :4].any() and bad[1, 4:, :2].all()  # heads of kv head 0 from that key on
    assert not bad[1, :6, 2:].any() and bad[1, 6:, 2:].all()
    assert bad[0, 11, 3].all() and not bad[0, :, :2, :5].any()
    channels = np.flatnonzero(bad[0, 20, 2])
    assert channels.tolist() == [5]


def test_the_mean_is_that_of_the_finite_keys():
    config = cache.CacheConfig(
        **SHAPE | dict(key=CODEC(((16, 3), (16, 4))), value=CODEC(4), dtype="float32")
    )
    rng = np.random.default_rng(4)
    keys, values = rng.normal(1, 1, (2, BATCH, 40, 2, 32)).astype(np.float32)
    keys[1, 3, 0, 30], keys[1, 9, 0, 1], keys[1, 12, 1, 17] = np.nan, np.inf, -np.inf
    keys[2, :, 1, 2] = np.nan
    state = cache.create(config, BATCH, 140, key=jax.random.key(0))
    new = Exact(jnp.asarray(keys), jnp.asarray(values))

    @partial(jax.jit, compiler_options=QUICK)
    def run(state):
        state = cache.begin(state, jnp.full(BATCH, 40, jnp.int32), 40)
        both = Compression("xla", "xla"), Compression("pallas", "xla")
        return [compression.compress_chunk(state, rows_of(state, 1), new, by) for by in both]

    with triton.interpreted():
        made = run(state)
    block = keys[:, 2:34].astype(np.float64)
    finite = np.isfinite(block).all(-1, keepdims=True)
    count = np.maximum(finite.sum(1), 1)
    want = np.where(finite, block, 0).sum(1) / count
    assert np.ptp(finite.sum(1)) == 32
    for found in made:
        np.testing.assert_allclose(found.key_mean[1], want, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(found.key_mean[1, 2, 1], 0)
        (part,), page = found.parts, np.asarray(found.table.pending_pages[:, 0])
        halves = [
            np.asarray(x)[2:, page].astype(np.uint16).view(jnp.bfloat16).astype(np.float32)
            for x in part.pool.scales
        ]  # [K, B, tokens]
        decodes = np.all([np.isfinite(x) for x in halves], axis=0)
        np.testing.assert_array_equal(np.moveaxis(decodes, 0, 2), finite[..., 0])


@pytest.mark.parametrize("interpret", [True, pytest.param(False, marks=GPU)])
def test_of_blocks_without_exact_tokens(interpret):
    """Which would be NaN with the same query, and tell a sum that is not positive."""
    call = make_call(Case(((3, 2),), (64,), heads=2))
    q, pools, table, lengths = arrays(call.arguments)
    run = jax.jit(lambda q, *held: decode_attention(q, PagedBlocks(*held), Softmax(0.1))[:2])

    def halves(word):  # of a token of kv head 1 in row 2
        (scales,) = pools[0].scales
        own = int(scales[1, table[2, 1], 7])
        changed = scales.at[1, table[2, 1], 7].set(np.uint32(word(own)))
        return (replace(pools[0], scales=(changed,)),)

    key = halves(lambda own: own & 0xFFFF0000 | 0x7FC0)
    value = halves(lambda own: own & 0xFFFF | 0x7FC00000)
    infinite = halves(lambda own: own & 0xFFFF | 0x7F800000)
    cases = [((q.at[2, 1, 5].set(bad), pools), [1]) for bad in BAD.values()]
    cases += [((q, one), [2, 3]) for one in (key, value, infinite)]
    with triton.interpreted(interpret):
        wants = run(q, pools, table, lengths)
        for inputs, heads in cases:
            for got, want in zip(run(*inputs, table, lengths), wants, strict=True):
                want = np.asarray(want).copy()
                want[2, heads] = np.nan
                np.testing.assert_array_equal(np.asarray(got), want)
