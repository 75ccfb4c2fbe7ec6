"""Tensor sizes and the cache's shape of a GGUF file, from its header alone.

The format (ggml's docs/gguf.md): magic, version, counts; key-value pairs; one entry per tensor with name, dimensions,
type and offset; then the data. A tensor's bytes are the distance to the next offset, so that no table of quantization
types is needed. The ``gguf`` package does the same with numpy and a mapping of the whole file, for the same sums.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from apps.profiles.fit import CacheShape, GgufFile, LayerGroup

MAGIC = b"GGUF"
FIXED = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # value type → bytes
STRING, ARRAY = 8, 9
UINT32 = 4
WHOLE_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 10: "Q", 11: "q"}
# Of the architecture's own keys (``llama.block_count``) those that shape the cache.
SHAPE = ("block_count", "attention.head_count_kv", "attention.key_length", "attention.sliding_window", "context_length")
LAYER = re.compile(r"blk\.(\d+)\.")
EXPERT = re.compile(r"blk\.\d+\.ffn_(up|down|gate|gate_up)_(ch)?exps\.")  # what --cpu-moe leaves on the CPU
MOST_TENSORS, MOST_PAIRS, MOST_TEXT, MOST_ITEMS = 200_000, 100_000, 1 << 26, 1 << 24
PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


def gguf_sizes(path: str | Path) -> GgufFile | None:
    """Sizes of the model that this file, or its first part of several, holds; None where it cannot be read as one.

    Remembered by name, time and size, since headers with large vocabularies take a tenth of a second."""
    found = []
    for part in _parts(Path(path)):
        try:
            stat = part.stat()
        except OSError:
            return None
        sizes = _read(str(part), stat.st_mtime_ns, stat.st_size)
        if sizes is None:
            return None
        found.append(sizes)
    layers: dict[int, int] = {}
    experts: dict[int, int] = {}
    embedding = output = other = 0
    shape = found[0][1]
    for tensors, _ in found:
        for name, size in tensors:
            match = LAYER.match(name)
            if match:
                layers[int(match[1])] = layers.get(int(match[1]), 0) + size
                if EXPERT.match(name):
                    experts[int(match[1])] = experts.get(int(match[1]), 0) + size
            elif name.startswith("token_embd."):
                embedding += size
            elif name.startswith("output."):
                output += size
            else:
                other += size
    rows = tuple(layers[at] for at in sorted(layers))
    total = sum(rows) + embedding + output + other
    return GgufFile(
        total,
        rows,
        embedding,
        output,
        other,
        _cache(shape),
        shape.get("context_length"),
        tuple(experts.get(at, 0) for at in sorted(layers)),
    )


def _cache(shape: dict[str, int]) -> CacheShape | None:
    """Which of its layers have a window the file does not say: from all of them to none."""
    layers, heads = shape.get("block_count"), shape.get("attention.head_count_kv")
    width, window = shape.get("attention.key_length"), shape.get("attention.sliding_window")
    if not (layers and heads and width):
        return None
    whole = (LayerGroup("full", layers, kv_heads=heads, head_dim=width),)
    if not window:
        return CacheShape(whole, whole)
    return CacheShape(
        (LayerGroup("sliding", layers, kv_heads=heads, head_dim=width, window=window),),
        whole,
        "The file does not say which layers keep a window only; from all to none are spanned.",
    )


def _parts(path: Path) -> list[Path]:
    match = PART.search(path.name)
    if not match:
        return [path]
    stem, count = path.name[: match.start()], int(match[2])
    return [path.with_name(f"{stem}-{at:05d}-of-{count:05d}.gguf") for at in range(1, min(count, 1000) + 1)]


@lru_cache(maxsize=64)
def _read(path: str, mtime_ns: int, size: int) -> tuple[tuple[tuple[str, int], ...], dict[str, int]] | None:
    try:
        with Path(path).open("rb") as file:
            return _tensors(file, size)
    except (OSError, ValueError, struct.error, UnicodeDecodeError):
        return None


def _tensors(file: BinaryIO, size: int) -> tuple[tuple[tuple[str, int], ...], dict[str, int]]:
    if file.read(4) != MAGIC:
        raise ValueError("not a GGUF file")
    version, tensors, pairs = struct.unpack("<IQQ", file.read(20))
    if version not in (2, 3) or tensors > MOST_TENSORS or pairs > MOST_PAIRS:
        raise ValueError("not a header of version 2 or 3")
    alignment = 32
    shape: dict[str, int] = {}
    for _ in range(pairs):
        key = _text(file)
        (kind,) = struct.unpack("<I", file.read(4))
        if key == "general.alignment" and kind == UINT32:
            (alignment,) = struct.unpack("<I", file.read(4))
        elif key.partition(".")[2] in SHAPE and kind in WHOLE_NUMBERS:
            (shape[key.partition(".")[2]],) = struct.unpack("<" + WHOLE_NUMBERS[kind], file.read(FIXED[kind]))
        else:
            _skip(file, kind)
    entries = []
    for _ in range(tensors):
        name = _text(file)
        (dimensions,) = struct.unpack("<I", file.read(4))
        if dimensions > 8:
            raise ValueError("a tensor with too many dimensions")
        file.seek(8 * dimensions + 4, 1)
        (offset,) = struct.unpack("<Q", file.read(8))
        entries.append((offset, name))
    entries.sort()
    if alignment < 1:
        raise ValueError("an alignment of nothing")
    data = -(-file.tell() // alignment) * alignment
    ends = [offset for offset, _ in entries[1:]] + [size - data]
    found = tuple((name, end - offset) for (offset, name), end in zip(entries, ends, strict=True))
    if any(count < 0 for _, count in found):
        raise ValueError("tensors beyond the end of the file: it is not whole")
    return found, shape


def _text(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MOST_TEXT:
        raise ValueError("a text longer than a header can be")
    return file.read(length).decode()


def _skip(file: BinaryIO, kind: int, depth: int = 0) -> None:
    if kind in FIXED:
        file.seek(FIXED[kind], 1)
    elif kind == STRING:
        (length,) = struct.unpack("<Q", file.read(8))
        if length > MOST_TEXT:
            raise ValueError("a text longer than a header can be")
        file.seek(length, 1)
    elif kind == ARRAY and depth < 4:
        inner, count = struct.unpack("<IQ", file.read(12))
        if count > MOST_ITEMS:
            raise ValueError("an array longer than a header can be")
        if inner in FIXED:
            file.seek(FIXED[inner] * count, 1)
        else:
            for _ in range(count):
                _skip(file, inner, depth + 1)
    else:
        raise ValueError(f"an unknown kind of value, {kind}")
