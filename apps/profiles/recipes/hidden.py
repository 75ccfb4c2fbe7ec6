"""Secrets in pasted text: recognised by their names and by their looks, and never kept or shown."""

from __future__ import annotations

import re

HIDDEN = "(hidden)"
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:token|key|keys|secret|password|passwd|pass|credential|credentials|auth)(?:$|[_-])", re.I
)
NOT_SECRET = re.compile(
    r"(?:^|[_-])(?:file|path|template|cache|kv|max|num|budget|tokens|ids?|index|type|bos|eos|pad)(?:$|[_-])", re.I
)
# Keys of known makers, bearer headers, and passwords in addresses.
LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|r[pe]-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,}|xox[abp]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]+)"
    r"|(?<=[Bb]earer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
NAMED = re.compile(
    r"(?:^|(?<=[\s'\"{,;&|(]))(?P<flag>--?)?(?P<name>[A-Za-z][A-Za-z0-9_.-]*)['\"]?"
    r"(?:(?P<sign>\s*[=:]\s*)|[ \t]+(?:\\\n\s*)?)",
    re.M,
)
VALUE = re.compile(r"\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',}\\]*[^\s\"',}\\;]")


def is_secret_name(name: str) -> bool:
    """``HF_TOKEN``, ``--api-key``, ``OPENAI_API_KEY``; not ``max_tokens`` or ``api_key_file``."""
    parts = name.lstrip("-").split(".")  # --some-config.token
    return any(SECRET_NAME.search(part) and not NOT_SECRET.search(part) for part in parts)


def redact(text: str) -> str:
    """The text with every secret in it replaced; everything else stays where it is."""
    kept, at, searched = [], 0, 0
    while (named := NAMED.search(text, searched)) is not None:
        searched = named.end()  # what follows may be a name itself: export TOKEN=..., -e TOKEN=...
        secret = is_secret_name(named["name"]) and (named["sign"] or named["flag"])
        if secret and (value := VALUE.match(text, searched)) is not None:
            kept += [text[at:searched], HIDDEN]
            at = searched = value.end()
    return LOOKS.sub(HIDDEN, "".join(kept) + text[at:])
