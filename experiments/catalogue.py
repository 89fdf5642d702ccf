"""Every experiment by room, in the order of the report."""

from experiments.fidelity import fidelity, layer_ablation, pytorch_greedy, qjl_ablation
from experiments.harness.experiment import Experiment
from experiments.peers import nearest_neighbor, quantization_time
from experiments.quantizers import (
    bit_width_ablation,
    codebook_ablation,
    distortion,
    inner_product,
    rotation_ablation,
    scale_ablation,
)
from experiments.speed import (
    cpu_decode,
    decode_speed,
    decode_tokens,
    encode_speed,
    llama_speed,
    prefill_speed,
    pytorch_speed,
    sharded_speed,
    speculation,
    step_speed,
    vllm_speed,
)
from experiments.tasks import greedy, needle, questions

EXPERIMENTS: tuple[Experiment, ...] = (
    distortion,
    inner_product,
    rotation_ablation,
    scale_ablation,
    codebook_ablation,
    bit_width_ablation,
    fidelity,
    qjl_ablation,
    layer_ablation,
    pytorch_greedy,
    needle,
    questions,
    greedy,
    decode_speed,
    sharded_speed,
    decode_tokens,
    step_speed,
    encode_speed,
    prefill_speed,
    llama_speed,
    speculation,
    pytorch_speed,
    vllm_speed,
    cpu_decode,
    nearest_neighbor,
    quantization_time,
)
