"""What a folder or file on this machine holds, and whether an engine could load it. Reads headers, never weights."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings

from apps.catalog.weights.choose import is_safe, quantization_of
from apps.common.errors import Invalid

GGUF_MAGIC = b"GGUF"
HEADER_MAX_BYTES = 256 * 2**20  # a safetensors header beyond this is nonsense; the format's own limit is 100 MB
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# A model lies in none of these, and an engine must not be pointed at them.
CLOSED = ("/proc", "/sys", "/dev", "/etc", "/boot", "/run")


@dataclass(frozen=True, slots=True)
class Found:
    path: str
    kind: str
    size_bytes: int
    architecture: str = ""
    quantization: str = ""


def look_at(raw: str) -> Found:
    """Raises Invalid with the sentence why an engine could not load it."""
    path = _allowed(raw)
    if not path.exists():
        raise _no(f"There is nothing at {path}.")
    if path.is_file():
        return _gguf(path)
    if not os.access(path, os.R_OK | os.X_OK):
        raise _no(f"The panel may not read {path}.")
    names = sorted(p.name for p in path.iterdir())
    gguf = [n for n in names if n.endswith(".gguf") and "mmproj" not in n.lower()]
    if "config.json" not in names and gguf:
        firsts = [n for n in gguf if "-of-" not in n or "-00001-of-" in n]
        if len(firsts) != 1:
            raise _no(f"{path} holds {len(firsts)} GGUF models ({', '.join(firsts[:4])}); name the file itself.")
        return _gguf(path / firsts[0])
    return _folder(path, names)


def _no(sentence: str) -> Invalid:
    return Invalid(sentence, fields={"path": [sentence]})


def _allowed(raw: str) -> Path:
    text = raw.strip()
    if not text.startswith("/") or "\0" in text or len(text) > 500:
        raise _no("Give the whole path, beginning with /.")
    path = Path(os.path.realpath(text))
    models, data = (Path(os.path.realpath(p)) for p in (settings.MODELS_DIR, settings.DATA_DIR))
    closed = any(path.is_relative_to(place) for place in CLOSED) or ".ssh" in path.parts or path == Path("/")
    if closed or (path.is_relative_to(data) and not path.is_relative_to(models)) or data.is_relative_to(path):
        raise _no(f"{path} is not a place for models.")
    return path


def _gguf(path: Path) -> Found:
    if not path.name.endswith(".gguf"):
        raise _no(f"{path.name} is not a .gguf file; for safetensors name the folder.")
    parts = [path]
    if "-of-" in path.name:
        stem, _, count = path.name.removesuffix(".gguf").rpartition("-of-")
        if not count.isdecimal() or not stem.endswith("-00001"):
            raise _no(f"{path.name} is one part of several; name the first one (-00001-of-…).")
        parts = [path.with_name(f"{stem[:-6]}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    for part in parts:
        try:
            with part.open("rb") as file:
                head = file.read(8)
        except FileNotFoundError:
            raise _no(f"{part.name} is missing; the model has {len(parts)} parts.") from None
        except OSError as error:
            raise _no(f"{part} cannot be read: {error.strerror}.") from None
        if head[:4] != GGUF_MAGIC or len(head) < 8 or not 1 <= struct.unpack("<I", head[4:])[0] < 100:
            raise _no(f"{part.name} does not begin like a GGUF file; it is damaged or something else.")
    size = sum(p.stat().st_size for p in parts)
    return Found(str(path), "gguf", size, quantization=quantization_of(path.name))


def _folder(path: Path, names: list[str]) -> Found:
    if "config.json" not in names:
        raise _no(f"{path} holds no config.json, so no engine knows what it is.")
    try:
        config = json.loads((path / "config.json").read_text("utf-8"))
        architecture = str((config.get("architectures") or [""])[0])
    except (OSError, ValueError, AttributeError, IndexError, TypeError):
        raise _no(f"{path / 'config.json'} cannot be read as JSON.") from None
    index = next((n for n in INDEXES if n in names), "")
    weights = [n for n in names if n.endswith(".safetensors")] or [
        n for n in names if n.startswith("pytorch_model") and n.endswith(".bin")
    ]
    if index:
        try:
            needed = sorted(set(json.loads((path / index).read_text("utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            raise _no(f"{path / index} cannot be read.") from None
        missing = [n for n in needed if n not in names]
        if missing:
            raise _no(f"{len(missing)} of {len(needed)} weight files are missing, the first is {missing[0]}.")
        weights = [str(n) for n in needed]
    if not weights:
        raise _no(f"{path} holds a config.json but no weights.")
    for name in weights:
        if name.endswith(".safetensors"):
            _safetensors(path / name)
    _layers(path)
    kind = "safetensors" if weights[0].endswith(".safetensors") else "pytorch"
    size = sum((path / n).stat().st_size for n in names if (path / n).is_file())
    return Found(str(path), kind, size, architecture)


def _layers(path: Path) -> None:
    """vLLM skips a Dense layer of Sentence Transformers whose weights are missing: its embeddings would be wrong, and
    nothing would say so."""
    try:
        modules = json.loads((path / "modules.json").read_text("utf-8"))
        dense = [str(m["path"]) for m in modules if str(m["type"]).endswith(".Dense")]
    except (OSError, ValueError, KeyError, TypeError):
        return  # none, or in a form that vLLM does not read either
    for folder in (path / name for name in dense if is_safe(name)):
        if (folder / "model.safetensors").is_file():
            _safetensors(folder / "model.safetensors")
        elif not (folder / "pytorch_model.bin").is_file():
            raise _no(f"{folder} holds no weights, and modules.json names it: without it, embeddings would be wrong.")


def _safetensors(path: Path) -> None:
    """The header says how long the file must be: a copy that was cut short is found without reading it."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = struct.unpack("<Q", file.read(8))[0]
            if length > min(size, HEADER_MAX_BYTES):
                raise ValueError
            header = json.loads(file.read(length))
        ends = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except OSError as error:
        raise _no(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, struct.error, KeyError, TypeError, AttributeError, IndexError):
        raise _no(f"{path.name} does not begin like a safetensors file; it is damaged.") from None
    if size != 8 + length + ends:
        raise _no(f"{path.name} has {size} bytes and should have {8 + length + ends}; it was cut short or changed.")
