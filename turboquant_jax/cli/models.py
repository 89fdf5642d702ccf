"""The model that a flag names: found, or what to write instead, before anything is loaded."""

import difflib
from pathlib import Path

from turboquant_jax.models.presets import PRESETS

RANDOM = "random:"
_FILES = (".gguf", ".bin", ".safetensors", ".json", ".pt", ".pth")


def resolve(model: str | None) -> str | None:
    """The name for `llama.load`: as given, or a preset in the case that it has.

    Raises:
      FileNotFoundError: neither a file, nor a folder, nor `random:` and a preset.
      ValueError: a folder without weights that can be read, and no such preset.
    """
    if model is None:
        return None
    if model.startswith(RANDOM):
        return RANDOM + _preset(model)
    path = Path(model)
    if path.is_dir():
        _check_folder(path)
    elif not path.exists():
        raise FileNotFoundError(f"{model}: {_missing(model)}")
    return model


def check_sized(model: str) -> None:
    """FileNotFoundError for a name that stands for no sizes: no preset, no file and no folder."""
    name = model.lower().removeprefix(RANDOM)
    if name not in PRESETS and not Path(model).exists():
        expected = f"expected one of {', '.join(PRESETS)}, a GGUF file, config.json or its folder"
        raise FileNotFoundError(f"{model}: no such file, {expected}")


def _preset(model: str) -> str:
    name = model.removeprefix(RANDOM).lower()
    if name not in PRESETS:
        raise ValueError(f"{model}: got no such preset, expected one of {', '.join(PRESETS)}")
    return name


def _missing(model: str) -> str:
    name = model.lower()
    if name in PRESETS:
        return (
            f"got the name of a preset, expected {RANDOM}{name} for random weights of its sizes, "
            "or the folder or GGUF file of a model that was downloaded"
        )
    expected = "expected a GGUF file, a Hugging Face folder, or random: and a preset"
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(_FILES):
        return (
            f"no such folder, {expected}; nothing is downloaded: if this is a model on the hub, "
            f"run `hf download {model} --local-dir FOLDER` first and give the folder"
        )
    near = difflib.get_close_matches(name, PRESETS, n=1)
    return f"no such file, {expected}" + (f", such as {RANDOM}{near[0]}" if near else "")


def _check_folder(folder: Path) -> None:
    """Refuse a folder that holds something else, saying what; all other faults loading finds."""

    def found(*patterns: str) -> list[str]:
        return sorted(path.name for pattern in patterns for path in folder.glob(pattern))

    if found("config.json"):
        pickled = found("pytorch_model*.bin", "consolidated*.pth", "*.pt")
        if pickled and not found("*.safetensors", "*.safetensors.index.json"):
            raise ValueError(
                f"{folder}: got weights in {pickled[0]} alone, which is pickled Python, expected "
                "model.safetensors; transformers' save_pretrained writes it"
            )
    elif found("adapter_config.json"):
        raise ValueError(
            f"{folder}: got an adapter (adapter_config.json), expected a whole model; merge it "
            "into its base model first: peft's merge_and_unload, then save_pretrained"
        )
    elif gguf := found("*.gguf"):
        raise ValueError(f"{folder}: got a folder of GGUF files, expected one, {folder / gguf[0]}")
