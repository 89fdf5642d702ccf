"""What a cache of a configuration is made of, as numpy arrays: the same as the JAX library's.

One seed gives one rotation in both: signs of Hadamard rotations are drawn here as `jax.random`
draws them, from Threefry-2x32 (Salmon et al., 2011). Dense random rotations are drawn by JAX
itself, the only thing here that imports it.
"""

from dataclasses import dataclass

import numpy as np
from scipy import linalg

from turboquant_jax.cache.config import CacheConfig, CodecConfig
from turboquant_jax.quantizers import formats
from turboquant_jax.quantizers.formats import Code, ScaleMode, Widths


@dataclass(frozen=True)
class RotationConstants:
    """Pi as a matrix [d, d]; of a Hadamard one also its signs [d] and the size of its blocks.

    `matrix` is None for the identity.
    """

    dim: int
    matrix: np.ndarray | None
    signs: np.ndarray | None = None
    block: int = 1


@dataclass(frozen=True)
class GroupConstants:
    """A group of channels: what `quantizers.quantizer.Quantizer` says of it."""

    rotation: RotationConstants
    levels: tuple[float, ...]
    bits: int
    code: Code
    scale: ScaleMode

    @property
    def dim(self) -> int:
        """Channels."""
        return self.rotation.dim

    @property
    def plane_widths(self) -> Widths:
        """Bit planes of an index."""
        return formats.plane_widths(self.code, self.bits)


@dataclass(frozen=True)
class CodecConstants:
    """The groups of a codec.

    Where one scale is for all of them, `turn` [H, H] has their rotations, and `power` is that of
    the deviation that weighs a group's error: 2 or 4 (`quantizers.channels`).
    """

    groups: tuple[GroupConstants, ...]
    turn: np.ndarray | None = None
    power: int = 0


def codecs_of(config: CacheConfig, seed: int) -> tuple[tuple[CodecConstants, CodecConstants], ...]:
    """The codecs of keys and of values, of every format of a configuration.

    As `cache.create(config, ..., key=jax.random.key(seed))` draws them.

    Raises:
      ValueError: a seed outside 32 bits, or a codec that cannot be or is not served.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: got {seed}, expected 0 to {2**32 - 1}")
    if config.scale_bits != 16:
        raise ValueError(f"scale_bits: got {config.scale_bits}, expected 16: torch has no others")
    keys = split(np.array([0, seed], np.uint32), 2)
    return tuple(
        (
            _codec(form.key, config.head_dim, keys[0]),
            _codec(form.value, config.head_dim, keys[1]),
        )
        for form in config.formats
    )


def _codec(config: CodecConfig, head_dim: int, key: np.ndarray) -> CodecConstants:
    if config.code == "prod":
        raise ValueError("code: got 'prod', expected one of scalar, trellis: in torch no sketches")
    groups, joint, made, turns = config.groups(head_dim), config.scales != "group", [], []
    for own, (channels, bits) in zip(split(key, len(groups)), groups, strict=True):
        rotation = _rotation(config, channels, own)
        turns.append(np.eye(channels) if rotation.matrix is None else rotation.matrix)
        if joint:
            rotation = RotationConstants(channels, None)
        levels = formats.levels(config.code, config.codebook, bits, head_dim if joint else channels)
        made.append(GroupConstants(rotation, levels, bits, config.code, config.scale))
    if not joint:
        return CodecConstants(tuple(made))
    return CodecConstants(
        tuple(made), linalg.block_diag(*turns), 2 if config.scales == "joint" else 4
    )


def _rotation(config: CodecConfig, dim: int, key: np.ndarray) -> RotationConstants:
    if config.rotation == "identity":
        return RotationConstants(dim, None)
    block = dim & -dim
    if config.rotation == "haar" or block == 1 or (config.rotation == "hadamard" and block != dim):
        return _by_jax(config, dim, key)
    signs = rademacher(key, dim)
    pattern = np.kron(np.eye(dim // block), linalg.hadamard(block) / np.sqrt(block))
    return RotationConstants(dim, pattern.astype(np.float32) * signs, signs, block)


def _by_jax(config: CodecConfig, dim: int, key: np.ndarray) -> RotationConstants:
    """A dense rotation, or the library's refusal of one."""
    import jax

    from turboquant_jax.quantizers import rotation

    with jax.default_device(jax.devices("cpu")[0]):
        found = rotation.create(
            config.rotation, jax.random.wrap_key_data(jax.numpy.asarray(key)), dim
        )
        return RotationConstants(dim, np.asarray(found.matrix))


def split(key: np.ndarray, count: int) -> np.ndarray:
    """`jax.random.split` of a raw key, uint32 [2]: [count, 2]."""
    high, low = threefry(key, *_counters(count))
    return np.stack([high, low], axis=1)


def rademacher(key: np.ndarray, count: int) -> np.ndarray:
    """`jax.random.rademacher` of a raw key: float32 [count] of +-1."""
    high, low = threefry(key, *_counters(count))
    # a uniform number below a half is one whose first bit is 0
    return np.where((high ^ low) >> np.uint32(31) == 0, 1.0, -1.0).astype(np.float32)


def threefry(
    key: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds of counters (first, second), uint32."""
    keys = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    turns = (13, 15, 26, 6), (17, 29, 16, 24)
    a, b = first + keys[0], second + keys[1]
    for round_ in range(5):
        for turn in turns[round_ % 2]:
            a = a + b
            b = a ^ (b << np.uint32(turn) | b >> np.uint32(32 - turn))
        a = a + keys[(round_ + 1) % 3]
        b = b + keys[(round_ + 2) % 3] + np.uint32(round_ + 1)
    return a, b


def _counters(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(count, np.uint32), np.arange(count, dtype=np.uint32)
