"""Which files of a repository an engine needs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

# Copies of the same weights for other programs, and what nobody loads.
OTHER_FOLDERS = ("original/", "onnx/", "openvino/", "metal/", "coreml/", "runs/", ".")
SMALL_FILE_BYTES = 64 * 2**20  # tokenizers and configurations; the largest known tokenizer.json has 33 MB
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})(?=\.\w+$)")
_QUANTIZATION = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q\d(?:_\w+)?|TQ\d_\d|BF16|F16|F32|MXFP4\w*))(?=[.-]|$)", re.IGNORECASE
)
# What Sentence Transformers puts behind a model, by the folders that it numbers; 0 is the model itself.
_LAYER = re.compile(r"([1-9]\d*_[^/]+)/(model\.safetensors|pytorch_model\.bin)$")
_TOKENIZER = re.compile(r"\.(json|txt|model|tiktoken|jinja|spm)$")


@dataclass(frozen=True, slots=True)
class RepoFile:
    """``sha256`` of files in large storage, ``blob_id`` (git's SHA-1 of the object) of the others."""

    name: str
    size_bytes: int
    sha256: str = ""
    blob_id: str = ""


@dataclass(frozen=True, slots=True)
class Choice:
    """``entry`` is what the engine is pointed at, below the folder; empty for the folder itself."""

    kind: str  # safetensors | gguf | pytorch
    files: tuple[RepoFile, ...]
    entry: str = ""
    quantization: str = ""

    @property
    def size_bytes(self) -> int:
        return sum(f.size_bytes for f in self.files)


@dataclass(frozen=True, slots=True)
class _Quantization:
    label: str
    files: list[RepoFile] = field(default_factory=list)


class NothingToChoose(Exception):
    """Nothing can be downloaded as asked; the message says why and what can."""


def is_safe(name: str) -> bool:
    """Whether a name from the hub stays below the folder it is put into."""
    parts = name.split("/")
    return not (
        not name or "\\" in name or "\0" in name or name.startswith("/") or any(p in ("", ".", "..") for p in parts)
    )


def quantization_of(name: str) -> str:
    """``Q4_K_M`` of ``model-Q4_K_M-00001-of-00002.gguf``; empty where the name tells none."""
    found = _QUANTIZATION.findall(_SHARD.sub("", name.rsplit("/", 1)[-1].removesuffix(".gguf")))
    return str(found[-1]).upper() if found else ""


def choose(files: Sequence[RepoFile], quantization: str = "") -> Choice:
    """The files to fetch. Raises NothingToChoose.

    A repository with safetensors gives those, unless a GGUF quantization is asked for.
    """
    usable = [f for f in files if is_safe(f.name)]
    gguf = [f for f in usable if f.name.endswith(".gguf") and "mmproj" not in f.name.lower()]
    root = [f for f in usable if "/" not in f.name]
    safetensors = [f for f in root if f.name.endswith(".safetensors")]
    # Mistral ships the same weights twice; engines load the sharded form.
    if any(not f.name.startswith("consolidated") for f in safetensors):
        safetensors = [f for f in safetensors if not f.name.startswith("consolidated")]
    has_config = any(f.name == "config.json" for f in root)
    if gguf and (quantization or not (safetensors and has_config)):
        return _choose_gguf(gguf, quantization)
    if quantization:
        raise NothingToChoose("This repository holds no GGUF files, so there is no quantization to choose.")
    pickled = [f for f in root if re.match(r"pytorch_model.*\.bin$", f.name)]
    weights = safetensors or pickled
    if not weights:
        raise NothingToChoose("This repository holds neither safetensors nor GGUF files; no engine here could load it.")
    if not has_config:
        mistral = any(f.name == "params.json" for f in root)
        why = "the weights in Mistral's own form only (params.json)" if mistral else "weights"
        raise NothingToChoose(
            f"This repository holds {why} and no config.json, so no engine here knows what they are. Look for one in "
            "the form of Transformers, or for a GGUF."
        )
    return Choice("safetensors" if safetensors else "pytorch", tuple(weights + _layers(usable) + _small(usable)))


def _layers(files: Sequence[RepoFile]) -> list[RepoFile]:
    """The weights of an embedding model's further layers. vLLM leaves a layer out whose weights it does not find, and
    answers all the same, with other vectors; as it does, safetensors are taken before a pickled copy."""
    if not any(f.name == "modules.json" for f in files):
        return []
    found: dict[str, RepoFile] = {}
    for file in files:
        if (layer := _LAYER.match(file.name)) and (layer[1] not in found or layer[2] == "model.safetensors"):
            found[layer[1]] = file
    return list(found.values())


def _small(files: Sequence[RepoFile]) -> list[RepoFile]:
    """Configuration and tokenizer. Code (``.py``) is left out: nothing from a hub is run here."""
    return [
        f
        for f in files
        if _TOKENIZER.search(f.name)
        and f.size_bytes <= SMALL_FILE_BYTES
        and not f.name.startswith(OTHER_FOLDERS)
        and f.name.count("/") <= 1
    ]


def _choose_gguf(files: Sequence[RepoFile], wanted: str) -> Choice:
    groups: dict[str, _Quantization] = {}
    for file in files:
        stem = _SHARD.sub("", file.name)
        groups.setdefault(stem, _Quantization(quantization_of(file.name))).files.append(file)
    fitting = [
        stem
        for stem, group in groups.items()
        if not wanted or wanted.upper() == group.label or wanted.lower() in (stem.lower(), stem.lower()[:-5])
    ]
    if len(fitting) != 1:
        offers = ", ".join(
            f"{g.label or stem} ({sum(f.size_bytes for f in g.files) / 2**30:.1f} GiB)"
            for stem, g in sorted(groups.items(), key=lambda item: sum(f.size_bytes for f in item[1].files))
        )
        if wanted and not fitting:
            raise NothingToChoose(f"There is no quantization {wanted!r} in this repository. It offers {offers}.")
        raise NothingToChoose(f"Choose one of the quantizations of this repository: {offers}.")
    group = groups[fitting[0]]
    parts = sorted(group.files, key=lambda f: f.name)
    if (found := _SHARD.search(parts[0].name)) and len(parts) != int(found[2]):
        raise NothingToChoose(
            f"The repository has {len(parts)} of the {int(found[2])} parts of {fitting[0]}; it is not complete."
        )
    return Choice("gguf", tuple(parts), entry=parts[0].name, quantization=group.label)
