"""What a profile may set for llama.cpp's server, and the flag that each option becomes.

Flags were read from ``llama-server --help`` of builds b10434 and b11434; both accept all of them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from apps.engines.options import SAFE_TEXT, Options, nearest
from apps.engines.protocol import InvalidOptions, OptionError

CacheType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]

# Named templates that are built into llama.cpp. A name is understood only without Jinja: with
# it (the default) the word itself is taken for the template, and every prompt becomes that word.
NAMED_TEMPLATES = (
    *("bailing", "bailing-think", "bailing2", "chatglm3", "chatglm4", "chatml", "command-r", "deepseek"),
    *("deepseek-ocr", "deepseek2", "deepseek3", "exaone-moe", "exaone3", "exaone4", "falcon3", "gemma"),
    *("gigachat", "glmedge", "gpt-oss", "granite", "granite-4.0", "granite-4.1", "grok-2"),
    *("hunyuan-dense", "hunyuan-moe", "hunyuan-vl", "kimi-k2", "llama2", "llama2-sys", "llama2-sys-bos"),
    *("llama2-sys-strip", "llama3", "llama4", "megrez", "minicpm", "mistral-v1", "mistral-v3"),
    *("mistral-v3-tekken", "mistral-v7", "mistral-v7-tekken", "monarch", "openchat", "orion"),
    *("pangu-embedded", "phi3", "phi4", "rwkv-world", "seed_oss", "smolvlm", "solar-open", "vicuna"),
    *("vicuna-orca", "yandex", "zephyr"),
)

# Further flags that a profile may pass as they are, each with the number of values it takes.
EXTRA_FLAGS = {
    "--context-shift": 0,
    "--cache-ram": 1,
    "--cache-reuse": 1,
    "--cpu-moe": 0,
    "--fit": 1,
    "--fit-ctx": 1,
    "--fit-target": 1,
    "--kv-unified": 0,
    "--load-mode": 1,
    "--mmproj": 1,
    "--n-cpu-moe": 1,
    "--no-kv-offload": 0,
    "--no-warmup": 0,
    "--numa": 1,
    "--override-kv": 1,
    "--override-tensor": 1,
    "--prio": 1,
    "--reasoning-budget": 1,
    "--rope-freq-base": 1,
    "--rope-freq-scale": 1,
    "--rope-scale": 1,
    "--rope-scaling": 1,
    "--seed": 1,
    "--swa-full": 0,
    "--temp": 1,
    "--top-k": 1,
    "--top-p": 1,
    "--min-p": 1,
    "--threads-http": 1,
    "--yarn-orig-ctx": 1,
}


class LlamaCppOptions(Options):
    context_tokens: Annotated[int, Field(ge=0, le=10_000_000)] | None = None  # 0: the model's own; all slots
    context_tokens_per_slot: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    parallel: Annotated[int, Field(ge=1, le=256)] | None = None
    gpu_layers: Annotated[int, Field(ge=0, le=1000)] | Literal["auto", "all"] | None = None
    split_mode: Literal["none", "layer", "row", "tensor"] | None = None
    # shares of the layers per GPU; by the cards' free memory where it is not given
    tensor_split: tuple[Annotated[float, Field(ge=0, le=10_000)], ...] | None = None
    main_gpu: Annotated[int, Field(ge=0, le=63)] | None = None  # among the replica's own; for split_mode none and row
    batch_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    micro_batch_tokens: Annotated[int, Field(ge=1, le=65536)] | None = None
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    threads_batch: Annotated[int, Field(ge=1, le=1024)] | None = None
    flash_attention: Literal["on", "off", "auto"] | None = None
    cache_type_k: CacheType | None = None
    cache_type_v: CacheType | None = None
    chat_template: str | None = None
    reasoning_format: Literal["none", "deepseek", "deepseek-legacy", "auto"] | None = None
    embeddings: bool | None = None
    pooling: Literal["none", "mean", "cls", "last", "rank"] | None = None
    extra_args: tuple[str, ...] | None = None

    @field_validator("chat_template")
    @classmethod
    def known_template(cls, value: str | None) -> str | None:
        if value is None or "{{" in value or "{%" in value or value in NAMED_TEMPLATES:
            return value
        similar = nearest(value, NAMED_TEMPLATES)
        hint = f" Did you mean {similar}?" if similar else ""
        raise ValueError(f"{value!r} is neither a Jinja template nor a name that llama.cpp knows.{hint}")

    @field_validator("extra_args")
    @classmethod
    def only_known_flags(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        check_extra_args(value or ())
        return value

    @model_validator(mode="after")
    def one_context(self) -> LlamaCppOptions:
        if self.context_tokens is not None and self.context_tokens_per_slot is not None:
            raise ValueError("give context_tokens (all slots together) or context_tokens_per_slot, not both")
        return self

    @model_validator(mode="after")
    def quantised_values_need_flash_attention(self) -> LlamaCppOptions:
        if self.cache_type_v not in (None, "f32", "f16", "bf16") and self.flash_attention == "off":
            raise ValueError(f"cache_type_v {self.cache_type_v} needs flash_attention on or auto")
        return self


# What llama.cpp calls the options that a profile names, and flags that mean an option: a hint for people who know
# the flags, and the recipes' dictionary.
FLAG_OPTIONS = {
    "--ctx-size": "context_tokens",
    "-c": "context_tokens",
    "--parallel": "parallel",
    "-np": "parallel",
    "--n-gpu-layers": "gpu_layers",
    "--gpu-layers": "gpu_layers",
    "-ngl": "gpu_layers",
    "--split-mode": "split_mode",
    "-sm": "split_mode",
    "--tensor-split": "tensor_split",
    "-ts": "tensor_split",
    "--main-gpu": "main_gpu",
    "-mg": "main_gpu",
    "--batch-size": "batch_tokens",
    "-b": "batch_tokens",
    "--ubatch-size": "micro_batch_tokens",
    "-ub": "micro_batch_tokens",
    "--threads": "threads",
    "-t": "threads",
    "--threads-batch": "threads_batch",
    "-tb": "threads_batch",
    "--flash-attn": "flash_attention",
    "-fa": "flash_attention",
    "--cache-type-k": "cache_type_k",
    "-ctk": "cache_type_k",
    "--cache-type-v": "cache_type_v",
    "-ctv": "cache_type_v",
    "--chat-template": "chat_template",
    "--reasoning-format": "reasoning_format",
    "--embedding": "embeddings",
    "--embeddings": "embeddings",
    "--pooling": "pooling",
}

# A flag of the panel's own under the other names that builds gave it, the newest first; "" means that it may be
# left out where a build has none of them.
SPELLINGS = {
    "--n-gpu-layers": ("--n-gpu-layers", "--gpu-layers"),
    "--no-webui": ("--no-webui", "--no-ui", ""),
    "--embeddings": ("--embeddings", "--embedding"),
    "--verbosity": ("--verbosity", "--log-verbosity", ""),
}
HELP_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


def help_flags(text: str) -> frozenset[str]:
    """The flags that ``llama-server --help`` names: those at the beginning of its lines, up to their values."""
    found: set[str] = set()
    for line in text.splitlines():
        if line.startswith("-") and not line.startswith("-----"):
            head = re.split(r"\s{2,}(?=[^\s-])", line, maxsplit=1)[0]
            found.update(HELP_FLAG.findall(head))
    return frozenset(found)


def fit_flags(arguments: Sequence[str], flags: frozenset[str] | None, build: str) -> tuple[str, ...]:
    """The command line in the spelling of one build. Raises InvalidOptions for flags that it does not have.

    ``flags`` are those of the build's own help; None leaves everything as it is."""
    if flags is None:
        return tuple(arguments)
    fitted: list[str] = []
    errors = []
    skipping = False
    for argument in arguments:
        is_flag = argument.startswith("--")
        if not is_flag:
            if not skipping:
                fitted.append(argument)
            continue
        known = next((s for s in SPELLINGS.get(argument, (argument,)) if s in flags or not s), None)
        skipping = not known
        if known:
            fitted.append(known)
        elif known is None:
            similar = nearest(argument, tuple(sorted(flags)))
            hint = f" The nearest it knows is {similar}." if similar else ""
            option = FLAG_OPTIONS.get(argument, "extra_args")
            errors.append(OptionError(option, f"{build} does not know {argument}.{hint}"))
    if errors:
        raise InvalidOptions(errors)
    return tuple(fitted)


def check_extra_args(args: tuple[str, ...]) -> None:
    """Raises ValueError unless ``args`` is a row of known flags, each with its values."""
    waiting = 0
    flag = ""
    for arg in args:
        if waiting:
            if not SAFE_TEXT.match(arg):
                raise ValueError(f"{flag} cannot take the value {arg!r}")
            waiting -= 1
        elif arg in EXTRA_FLAGS:
            flag, waiting = arg, EXTRA_FLAGS[arg]
        else:
            similar = nearest(arg, tuple(EXTRA_FLAGS))
            hint = f"; did you mean {similar}?" if similar else "; use the named options where there is one"
            raise ValueError(f"{arg} is not among the flags that may be passed as they are{hint}")
    if waiting:
        raise ValueError(f"{flag} is missing its value")
