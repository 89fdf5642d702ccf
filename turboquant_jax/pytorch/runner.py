"""Runs calls on torch tensors."""

import torch


def run(
    name: str,
    spec: str,
    read: list[torch.Tensor],
    written: list[torch.Tensor],
    outputs: list[torch.Tensor],
) -> None:
    """One call (`operands.flatten`), which writes to `written` and fills `outputs`."""
    device = (read + written)[0].device
    if device.type != "cpu":
        raise NotImplementedError(f"device: got {device}, served is cpu")
    from turboquant_jax.pytorch import interpreted  # imports jax

    interpreted.run(name, spec, read, written, outputs)
