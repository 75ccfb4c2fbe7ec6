"""What a catalogue entry may hold, checked where it enters: the shipped file, the form, the API."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from apps.common.errors import Invalid

# Text goes to pages and, as checkpoint, to a command line: no control characters, no leading dash.
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*\Z")
_SLUG = r"^[a-z0-9]+(?:-[a-z0-9]+)*$"


def _plain(value: str) -> str:
    if _CONTROL.search(value):
        raise ValueError("must be plain text without control characters")
    return value


def _prose(value: str) -> str:
    if _CONTROL.search(value.replace("\n", "").replace("\r", "").replace("\t", "")):
        raise ValueError("must be plain text without control characters")
    return value


def _repository(value: str) -> str:
    if value and not _REPOSITORY.match(value):
        raise ValueError("must look like owner/name, as on the hub")
    return value


def _checkpoint(value: str) -> str:
    """A hub repository, an absolute path, or a GGUF file below the models folder."""
    if not value or _REPOSITORY.match(value):
        return value
    if value.startswith("-") or ".." in value.split("/"):
        raise ValueError(
            "must be a hub repository (owner/name), an absolute path, or a .gguf file below the models folder"
        )
    if value.startswith("/") or value.endswith(".gguf"):
        return _plain(value)
    raise ValueError("must be a hub repository (owner/name), an absolute path, or a .gguf file below the models folder")


Short = Annotated[str, StringConstraints(strip_whitespace=True, max_length=100), AfterValidator(_plain)]
Medium = Annotated[str, StringConstraints(strip_whitespace=True, max_length=200), AfterValidator(_plain)]
Word = Annotated[str, StringConstraints(strip_whitespace=True, max_length=40, pattern=r"^[A-Za-z0-9_.-]*$")]
Prose = Annotated[str, StringConstraints(strip_whitespace=True, max_length=2000), AfterValidator(_prose)]
Sentence = Annotated[
    str, StringConstraints(strip_whitespace=True, max_length=600, min_length=1), AfterValidator(_plain)
]
Count = Annotated[int, Field(ge=1, le=2_000_000_000, strict=True)]
Big = Annotated[int, Field(ge=1, le=10**15, strict=True)]
Dim = Annotated[int, Field(ge=0, le=10_000_000, strict=True)]


class KvFacts(BaseModel):
    """The cache per token, by kind of layer. ``bytes_per_token_bf16`` counts all ranks together."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["gqa_full", "mla", "sliding_hybrid", "hybrid_gdn", "hybrid_mamba2", "none"]
    layers: Dim | None = None
    full_layers: Dim | None = None
    sliding_layers: Dim | None = None
    full_attention_layers: Dim | None = None
    linear_layers: Dim | None = None
    window: Dim | None = None
    kv_heads: Dim | None = None
    head_dim: Dim | None = None
    global_kv_heads: Dim | None = None
    global_head_dim: Dim | None = None
    kv_lora_rank: Dim | None = None
    qk_rope_head_dim: Dim | None = None
    replicated_across_tp: bool | None = None
    linear_num_key_heads: Dim | None = None
    linear_num_value_heads: Dim | None = None
    linear_head_dim: Dim | None = None
    conv_kernel: Dim | None = None
    bytes_per_token_bf16: Dim | None = None


class ModelFacts(BaseModel):
    """One entry; ``None`` where nobody could source a fact."""

    model_config = ConfigDict(extra="forbid")

    slug: Annotated[str, StringConstraints(pattern=_SLUG, max_length=100)]
    name: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=200), AfterValidator(_plain)]
    hf_repo: Annotated[Medium, AfterValidator(_repository)] = ""
    checkpoint: Annotated[
        str,
        StringConstraints(strip_whitespace=True, max_length=300),
        AfterValidator(_plain),
        AfterValidator(_checkpoint),
    ] = ""
    checkpoint_note: Prose = ""
    architecture: Short | None = None
    licence: Short | None = None
    params_total: Big | None = None
    params_active: Big | None = None
    layers: Count | None = None
    hidden_size: Count | None = None
    attention_heads: Count | None = None
    kv_heads: Count | None = None
    head_dim: Count | None = None
    intermediate_size: Count | None = None
    vocab_size: Count | None = None
    experts: Count | None = None
    experts_per_token: Count | None = None
    max_context_tokens: Count | None = None
    attention_type: Medium | None = None
    kv: KvFacts | None = None
    quantization: Medium | None = None
    weights_bytes: Big | None = None
    weights_formula: Medium | None = None
    tool_parser: Word = ""
    reasoning_parser: Word = ""
    chat_template: Word | None = None
    sources: Annotated[list[Sentence], Field(max_length=20)] = []
    notes: Annotated[list[Sentence], Field(max_length=40)] = []

    def columns(self) -> dict[str, Any]:
        """As the database stores it: empty text instead of ``None``, and only the cache facts that are known."""
        values = self.model_dump(exclude={"kv"})
        for name in ("architecture", "licence", "attention_type", "quantization", "weights_formula", "chat_template"):
            values[name] = values[name] or ""
        values["kv"] = self.kv.model_dump(exclude_none=True) if self.kv else {}
        return values


class ShippedCatalogue(BaseModel):
    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1]
    note: str
    models: list[ModelFacts]


def checked(values: dict[str, Any]) -> ModelFacts:
    """Raises Invalid with a sentence per field."""
    try:
        return ModelFacts.model_validate(values)
    except ValidationError as error:
        fields: dict[str, list[str]] = {}
        for part in error.errors():
            name = str(part["loc"][0]) if part["loc"] else "model"
            inner = ".".join(str(p) for p in part["loc"][1:])
            message = part["msg"].removeprefix("Value error, ")
            if name == "slug" and part["type"] == "string_pattern_mismatch":
                message = "Use lowercase letters, digits and single dashes"
            if part["type"] == "extra_forbidden":
                message = "There is no such fact"
            message = f"{inner}: {message}" if inner else message
            fields.setdefault(name, []).append(message[:1].upper() + message[1:] + ".")
        raise Invalid("This model cannot be stored: see " + ", ".join(sorted(fields)) + ".", fields=fields) from error
