"""Memory of `convert --from=hf` on a checkpoint that is larger than the memory it may use.

    python benchmarks/convert_memory.py --gigabytes=8.5 --directory=/path/with/room

writes synthetic sharded safetensors (so many bytes of float32, or of bfloat16 with --dtype), one
layer after the other with constant memory, converts them in a process of its own and prints that
process's peak resident memory beside the largest stacked tensor, and the same for `--to=hf`. Needs
about five times the gigabytes of disk in float32.
"""

import argparse
import json
import os
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time

import jax
import ml_dtypes
import numpy as np
from sentencepiece import sentencepiece_model_pb2

from t5x_lite.interop import hf
from t5x_lite.models import t5
from t5x_lite.models.config import T5Config

# xxl's shape but for the number of layers, and xl's.
WIDTHS = {
    "xxl": T5Config(d_model=4096, d_ff=10240, d_kv=64, num_heads=64),
    "xl": T5Config(d_model=2048, d_ff=5120, d_kv=64, num_heads=32),
}


def config_of(width: str, gigabytes: float, itemsize: int) -> T5Config:
    """As many layers, the same in both stacks, as make a checkpoint of at least that size."""
    layers = 1
    while True:
        values = WIDTHS[width].to_dict() | dict.fromkeys(
            ("num_encoder_layers", "num_decoder_layers"), layers
        )
        config = T5Config.from_dict(values)
        if t5.num_parameters(config) * itemsize >= gigabytes * 1e9:
            return config
        layers += 1


def write_checkpoint(directory: pathlib.Path, config: T5Config, dtype: np.dtype, name: str) -> int:
    """Shards of about 2 GB with an index; every tensor is a random row repeated. Returns bytes."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    size = 0
    for tensor in hf.tensors_of(config):
        num_bytes = int(np.prod(tensor.shape)) * dtype.itemsize
        if size + num_bytes > 2e9 and shards[-1]:
            shards.append([])
            size = 0
        shards[-1].append((tensor.name, tensor.shape))
        size += num_bytes
    weight_map, total = {}, 0
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        header, offset = {}, 0
        for tensor_name, shape in shard:
            end = offset + int(np.prod(shape)) * dtype.itemsize
            header[tensor_name] = {"dtype": name, "shape": shape, "data_offsets": [offset, end]}
            weight_map[tensor_name], offset = file, end
        text = json.dumps(header).encode()
        with open(directory / file, "wb") as f:
            f.write(struct.pack("<Q", len(text)) + text)
            for tensor_name, shape in shard:
                rng = np.random.default_rng(len(tensor_name))
                row = rng.standard_normal(shape[-1]).astype(dtype).tobytes()
                rows = int(np.prod(shape[:-1]))
                f.writelines(row * min(1024, rows - first) for first in range(0, rows, 1024))
        total += offset
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    values = hf.config_to_hf(config, model_class="t5")
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "spiece.model").write_bytes(make_vocabulary(32000))
    return total


def make_vocabulary(num_pieces: int) -> bytes:
    """A SentencePiece model with as many pieces as T5's, none of which mean anything."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.pad_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = 0, 1, 2
    model.trainer_spec.bos_id = -1
    piece_type = model.SentencePiece
    for piece, kind in (
        ("<pad>", piece_type.CONTROL),
        ("</s>", piece_type.CONTROL),
        ("<unk>", piece_type.UNKNOWN),
        *((f"\u2581w{i}", piece_type.NORMAL) for i in range(num_pieces - 3)),
    ):
        model.pieces.add(piece=piece, score=0.0, type=kind)
    return model.SerializeToString()


def run(*arguments: str) -> tuple[float, float, float]:
    """Peak resident GB, seconds and CPU-seconds of `convert` in a process of its own."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "t5x_lite", "convert", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"convert failed: {status}")
    cpu = usage.ru_utime + usage.ru_stime
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - began, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.5)
    parser.add_argument("--width", choices=sorted(WIDTHS), default="xl")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--directory", help="where there is room for it (default: temporary)")
    arguments = parser.parse_args()
    dtype = np.dtype(ml_dtypes.bfloat16 if arguments.dtype == "bfloat16" else np.float32)
    config = config_of(arguments.width, arguments.gigabytes, dtype.itemsize)
    shapes = jax.eval_shape(lambda key: t5.init(config, key), jax.random.key(0))
    largest = max(leaf.size * 4 for leaf in jax.tree.leaves(shapes)) / 1e9
    root = pathlib.Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        source, model, out = root / "hf", root / "model", root / "out"
        source.mkdir()
        name = "BF16" if arguments.dtype == "bfloat16" else "F32"
        total = write_checkpoint(source, config, dtype, name)
        print(
            f"{arguments.width}, {config.num_encoder_layers} + {config.num_decoder_layers} layers: "
            f"{total / 1e9:.2f} GB of {arguments.dtype}; largest stacked tensor {largest:.3f} GB"
        )
        for what, flags in (
            ("--from=hf", ("--from=hf", str(source), f"--to={model}")),
            ("--to=hf", (str(model), "--to=hf", str(out))),
        ):
            peak, seconds, cpu = run(*flags)
            print(
                f"{what}: peak {peak:.3f} GB = {peak / largest:.2f} x the largest stacked tensor; "
                f"{seconds:.0f} s, {cpu:.0f} CPU-s"
            )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
