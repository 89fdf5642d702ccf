"""What compression does to real models.

SmolLM2-135M-Instruct (head dim 64, 30 layers, 9 query and 3 KV heads), and where it is named
Qwen2.5-Coder-Instruct 0.5B (64; 24; 14 and 2; biases make its keys large) and 1.5B (128; 28; 12 and
2), all dequantized from 4 bits, read texts, each query seeing exactly what it would see when
decoding token by token; full precision is the same model with a cache of bfloat16. Bytes are those
of the whole cache of one sequence over its tokens: codes, scales, window, sinks, mean key, page
tables. Settings are chosen on the calibration texts (essays, encyclopedic articles) and judged on
the test texts (encyclopedia, Bible, code), 8,192 tokens each; curves over one property at a time
are calibration texts at 2,048 tokens. Errors are over chunks of 1,024 tokens, paired with full
precision, and over three rotations. The error of attention outputs compares with full precision on
the same queries, keys and values, those of the compressed pass; K4 V2 w64 is 4 bits for keys, 2 for
values and a window of 64. `scale8` stores scales in 8 bits, which the library does not. Keys are
centred by the mean of the first block as stored, `pre-RoPE` by its mean before the rotary
embedding, at each key's own position.

Two peers read a model first, as our calibration does; they are given the texts that choose
(`fidelity.informed`). OSCAR turns keys and values by the eigenvectors of what attention asks of
them and a Hadamard, clips, and has 2 bits with a zero and a step; 64 sinks and a window of 256.
Block-GTQ gives pairs of channels that RoPE turns together bits of their own, and each group of
equal bits a norm, a rotation and TurboQuant's levels.

How both means do over length is read from the last tokens of each text: the same tokens are
predicted after more and more of what precedes them.

The command below says how much of this was run; its seconds are those of all processes that shared
its journal. Ratios "at 64K" are bytes of a cache of 65,536 tokens beside a loss at the length of
the texts, which is kinder: more of a short text lies in the window.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax
import numpy as np

from experiments.fidelity import calibrated as calibrations
from experiments.fidelity import choices, judgement, losses
from experiments.fidelity import figure as drawing
from experiments.fidelity.calibrated import Calibrated
from experiments.fidelity.forcing import Forcing, cut
from experiments.fidelity.informed import informed, moments
from experiments.fidelity.losses import Subject
from experiments.fidelity.settings import Setting, peers, turbo, unique
from experiments.harness import prepared
from experiments.harness.experiment import Row, Track, option, where
from experiments.harness.journal import Journal, open_journal
from experiments.harness.prepared import CALIBRATION, LANGUAGE, TEST

NEEDS = prepared.NEEDS
KEYS = ("model", "kind", "split", "text", "context", "last", "preset")
Held = Setting | Calibrated


@dataclass(frozen=True)
class Config:
    """What to run."""

    model: str = option(prepared.SMOLLM2, f"{', '.join(prepared.MODELS)}, or tiny: random weights")
    context: int = option(8192, "tokens of the texts that settings are chosen and judged by")
    screen: int = option(2048, "tokens of the texts of the curves")
    others: tuple[int, ...] = option((512, 2048), "other lengths for a few settings")
    lengths: tuple[int, ...] = option((1024, 2048, 4096, 8192), "tokens up to the ends of texts")
    last: int = option(512, "tokens at the ends that are judged over length")
    parts: tuple[str, ...] = option(
        (
            *("candidate", "chosen", "peer", "noise", "curve", "context", "centring", "length"),
            *("calibrating", "calibrated", "language", "informed"),
        ),
        "what is measured, in order",
    )
    rows: int = option(0, "texts of each name, 0 for all")
    settings: int = option(0, "settings of each part, 0 for all")
    seeds: int = option(3, "draws of the rotations")
    precision: str = option("highest", "of float32 products, see jax.default_matmul_precision")
    calibrations: tuple[str, ...] = option(
        tuple(f"experiments/calibrations/smollm2-135m{end}.safetensors" for end in ("", "-six")),
        "files of turboquant-jax calibrate whose presets are judged",
    )
    windows: tuple[int, ...] = option((0,), "other windows of `max` beside them, 0 for none")
    seconds: float = option(0.0, "stop starting new settings after so long, 0 for never")


SMOKE = Config(
    *("tiny", 200, 160, (), (200,), 40),
    *(("candidate", "chosen", "centring", "length"), 4, 2, 2),
)


def run(config: Config, track: Track) -> list[Row]:
    """Candidates on the calibration texts, the best and the peers on the test texts, curves."""
    if unknown := {*config.parts} - {*Config().parts}:
        raise ValueError(f"parts: got {sorted(unknown)}, expected some of {Config().parts}")
    journal = open_journal("fidelity", config, ("parts", "settings", "calibrations", "windows"))
    forcing = cut(prepared.model(config.model), config.precision)
    layers = forcing.model.config.num_layers
    seeds = list(range(config.seeds))

    def measure(
        part: str, split: str, context: int, settings: Sequence[Held], last: int = 0
    ) -> list[Row]:
        found: list[Row] = []
        held = Lazy(forcing, config, split, context, last)
        for setting in track(unique(settings)[: config.settings or None], f"fidelity: {part}"):
            case = f"{part} {split} {context} {setting.preset}"

            def make(setting=setting) -> list[Row]:
                made = losses.measure(held.subject, setting, seeds, errors=part == "curve")
                judging = TEST if split == LANGUAGE else split  # no text of it chose anything
                head: Row = {"model": config.model, "kind": part, "split": judging}
                head |= {"last": last} if last else {}
                return list(_rows(held.subject, setting, made.last(last) if last else made, head))

            found += journal.measure(case, make)
        return found

    def chosen() -> list[Setting]:
        names = choices.chosen(where(rows, kind="candidate", text="all"))
        candidates = {setting.preset: setting for setting in choices.candidates()}
        return [*choices.judged(), *(candidates[name] for name in names)]

    def calibrated() -> list[Held]:
        files = config.calibrations if config.model != "tiny" else ()
        windows = [window for window in config.windows if window]
        found = [
            one for file in files for one in calibrations.presets_of(file, forcing.model, windows)
        ]
        return [*found, *calibrations.uniform()]

    def asked() -> list[Setting]:
        texts = prepared.texts(CALIBRATION, short, 2, config.model)
        return informed(moments(forcing.model, np.concatenate(list(texts.values()))))

    long, short, rows = config.context, config.screen, []
    made = {
        "candidate": lambda: measure("candidate", CALIBRATION, long, choices.candidates()),
        "chosen": lambda: measure("chosen", TEST, long, chosen()),
        "peer": lambda: measure("peer", TEST, long, peers(layers)),
        "noise": lambda: _noise(config, journal, forcing),
        "curve": lambda: measure("curve", CALIBRATION, short, choices.curves()),
        "context": lambda: [
            row
            for length in config.others
            for row in measure("context", TEST, length, choices.few())
        ],
        "centring": lambda: measure("centring", TEST, long, choices.centring()),
        "length": lambda: [
            row
            for length in config.lengths
            for row in measure("length", TEST, length, choices.over_length(), config.last)
        ],
        "calibrating": lambda: measure("calibrating", CALIBRATION, long, calibrated()),
        "calibrated": lambda: measure("calibrated", TEST, long, calibrated()),
        "language": lambda: measure("language", LANGUAGE, long, calibrated()),
        "informed": lambda: measure("peer", TEST, long, asked()),
    }
    for part in config.parts:
        rows += made[part]()
    return rows


class Lazy:
    """The texts of a split and length, read and passed in full precision when first asked for."""

    def __init__(self, forcing: Forcing, config: Config, split: str, context: int, ends: int = 0):
        self._make = forcing, config, split, context, bool(ends)
        self._held: Subject | None = None

    @property
    def subject(self) -> Subject:
        """The texts."""
        if self._held is None:
            forcing, config, split, context, ends = self._make
            texts = (_ends if ends else _texts)(config, split, context)
            self._held = losses.subject(forcing, texts, prepared.PASS_TOKENS)
        return self._held


def _texts(config: Config, split: str, context: int) -> Mapping[str, np.ndarray]:
    rows = config.rows or None
    if config.model == "tiny":
        return {split: prepared.random_texts(config.rows, context)}
    if context < config.context and rows is None:
        rows = max(1, 8192 // context)  # the first 8,192 tokens of each name
    return prepared.texts(split, context, rows, config.model)


def _ends(config: Config, split: str, context: int) -> Mapping[str, np.ndarray]:
    """The last tokens of the longest texts."""
    whole = replace(config, context=max(config.lengths))
    texts = _texts(whole, split, whole.context)
    return {name: tokens[:, -context:] for name, tokens in texts.items()}


def _rows(subject: Subject, setting: Held, made: losses.Losses, labels: Row) -> Iterator[Row]:
    """A row for all texts of the split together, then one for each."""
    context = subject.batches[0].shape[1]
    sizes = setting.sizes(subject.forcing.model.config, context)
    whole = slice(0, len(made.full))
    parts = list(zip(subject.names, subject.slices, strict=True))
    for text, which in [("all", whole), *(parts if len(parts) > 1 else [])]:
        head = {**labels, "text": text, "context": context}
        yield {**head, **setting.columns(), **sizes, **made.rows(which).columns()}


def _noise(config: Config, journal: Journal, forcing: Forcing) -> list[Row]:
    """What is measured where nothing is compressed: arithmetic in TensorFloat-32 instead."""
    context = config.screen
    texts = _texts(config, CALIBRATION, context)

    def make() -> list[Row]:
        tokens = np.concatenate(list(texts.values()))
        rough, exactly = (cut(forcing.model, p) for p in ("tensorfloat32", "highest"))
        exact = exactly.full(tokens)
        compared = exactly.compare(tokens, exact, rough.full(tokens))
        nll = exactly.compare(tokens, exact, exact).nll
        made = losses.Losses(
            nll, compared.nll[None], compared.kl[None], compared.agrees[None], None
        )
        nothing = turbo(None, None)
        head: Row = {"model": config.model, "kind": "noise", "split": CALIBRATION}
        head |= {"text": "all", "context": context}
        columns = {**nothing.columns(), "preset": "full precision in tensorfloat32"}
        device = {"device": jax.devices()[0].device_kind}
        sizes = nothing.sizes(forcing.model.config, context)
        return [{**head, **columns, **sizes, **made.columns(), **device}]

    return journal.measure("noise", make)


claims, figure = judgement.claims, drawing.figure
