"""Tiny bases in MXFP4 and FP8, with random weights."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file

from composites import save_composite
from mixtures import MIXTURES, save_mixture

BLOCK = 32
LIKE_LLAMA = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


def to_mxfp4(folder):
    """Replace the experts of a base by random ones in MXFP4, as gpt-oss has them."""
    generator = torch.Generator().manual_seed(0)
    path = folder / "model.safetensors"
    made = {}
    for name, tensor in load_file(path).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[name] = tensor
            continue
        experts, inputs, outputs = tensor.shape
        shape = experts, outputs, inputs // 32
        made[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        made[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
    save_file(made, path, metadata={"format": "pt"})
    quantized_by(folder, {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})


def to_fp8(folder, block=BLOCK, end="weight_scale_inv", prefix=""):
    """Round the linear layers of a base to FP8, with a scale for each block; without a block, one for all."""
    path = folder / "model.safetensors"
    made = {}
    for name, tensor in load_file(path).items():
        if not (name.startswith(prefix) and "_proj.weight" in name and tensor.ndim == 2):
            made[name] = tensor
            continue
        rows, columns = tensor.shape
        height, width = (block, block) if block else (rows, columns)
        padded = torch.zeros(-(-rows // height) * height, -(-columns // width) * width)
        padded[:rows, :columns] = tensor
        blocks = padded.view(-(-rows // height), height, -(-columns // width), width)
        scales = (blocks.abs().amax((1, 3)) / 448).clamp(min=1e-6)
        values = (blocks / scales[:, None, :, None]).reshape(padded.shape)[:rows, :columns].contiguous()
        made[name] = values.to(torch.float8_e4m3fn)
        made[name.replace("weight", end)] = scales if block else scales.reshape(())
        if not block:
            made[name.replace("weight", "activation_scale")] = torch.tensor(1.0)
    save_file(made, path, metadata={"format": "pt"})
    size = [block, block] if block else None
    quantized_by(folder, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": size})


def quantized_by(folder, config):
    values = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({**values, "quantization_config": config}))


def quantized_base(folder, kind, **options):
    """Write a base in FP8; gpt-oss in MXFP4, as it is published."""
    if kind == "gpt_oss":
        save_mixture(folder, kind, **MIXTURES[kind])
        to_mxfp4(folder)
    elif kind == "mistral3":
        save_composite(folder, kind)
        to_fp8(folder, prefix="model.language_model", **options)
    elif kind == "llama":
        save_mixture(folder, kind, vocab_size=320, **LIKE_LLAMA)
        to_fp8(folder, **options)
    else:
        save_mixture(folder, kind, **MIXTURES[kind])
        to_fp8(folder, **options)
    return folder
