"""Models as folders and the Hub hold them, with headers of weights and no weights."""

import json

from qlora_memory import model_shape


def header_of(config):
    """The headers of the model's weights, as safetensors would write them, in shards."""
    shape = model_shape(config)
    entries = {f"{i.name}.weight": [i.outputs, i.inputs] for i in shape.linears}
    entries |= {
        "model.embed_tokens.weight": [shape.head.linear.outputs, shape.hidden],
        "lm_head.weight": [shape.head.linear.outputs, shape.hidden],
        "model.norm.weight": [shape.hidden],
    }
    for index in range(len(shape.layers)):
        for name in ("input_layernorm", "post_attention_layernorm"):
            entries[f"model.layers.{index}.{name}.weight"] = [shape.hidden]
    return entries


def shard(entries):
    at, header = 0, {"__metadata__": {"format": "pt"}}
    for name, shape in entries.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + b"weights" * 100_000


def model_files(config, shards=1):
    """Return the files of a model: its configuration, and weights of which the headers alone are whole."""
    entries = list(header_of(config).items())
    files = {"config.json": json.dumps(config).encode()}
    if shards == 1:
        return {**files, "model.safetensors": shard(dict(entries))}
    names = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    index = {}
    for n, name in enumerate(names):
        part = dict(entries[n::shards])
        files[name] = shard(part)
        index |= dict.fromkeys(part, name)
    return {**files, "model.safetensors.index.json": json.dumps({"weight_map": index}).encode()}


def write(folder, files):
    """Write files into a folder; return its path."""
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return str(folder)
