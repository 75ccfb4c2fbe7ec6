"""Secrets in pasted text: recognised by their names and by their looks, and never kept or shown."""

from __future__ import annotations

import re

HIDDEN = "(hidden)"
SECRET_NAME = re.compile(
    r"(?:^|[_-])(?:token|key|keys|secret|password|passwd|pass|credential|credentials|auth)(?:$|[_-])", re.I
)
NOT_SECRET = re.compile(r"(?:^|[_-])(?:file|path|template|cache|kv|max|num|budget|tokens|ids?)(?:$|[_-])", re.I)
# Keys of known makers, bearer headers, and passwords in addresses.
LOOKS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{8,}|r[pe]-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|AKIA[A-Z0-9]{12,}|xox[abp]-[A-Za-z0-9-]{10,}|eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_.-]+)"
    r"|(?<=[Bb]earer )\S+|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"
)
ASSIGNED = re.compile(
    r"(?P<head>(?:^|(?<=[\s'\"{,]))(?:--?)?(?P<name>[A-Za-z][A-Za-z0-9_-]*)['\"]?"
    r"(?P<sep>\s*[=:]\s*|[ \t]+(?:\\\n\s*)?))"
    r"(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',}\\]+)",
    re.M,
)


def is_secret_name(name: str) -> bool:
    """``HF_TOKEN``, ``--api-key``, ``OPENAI_API_KEY``; not ``max_tokens`` or ``api_key_file``."""
    name = name.lstrip("-")
    return bool(SECRET_NAME.search(name)) and not NOT_SECRET.search(name)


def redact(text: str) -> str:
    """The text with every secret in it replaced; everything else stays where it is."""

    def assigned(match: re.Match[str]) -> str:
        name, flag = match["name"], match["head"].lstrip().startswith("-")
        by_space = not match["sep"].strip()
        if not is_secret_name(name) or (by_space and not flag):
            return match[0]
        return match["head"] + HIDDEN

    return LOOKS.sub(HIDDEN, ASSIGNED.sub(assigned, text))
