"""What pip and venv say when they fail, as a sentence."""

from __future__ import annotations

import re

from apps.jobs.child import ChildFailed

CAUSES = (
    (
        r"No space left on device|Errno 28|Disk quota exceeded",
        "{what} failed because the disk is full. Make room and install again.",
    ),
    (
        r"ensurepip is not|No module named ensurepip|No module named venv",
        "{what} failed: this Python has no venv module. On Ubuntu: apt install python3-venv.",
    ),
    (
        r"DO NOT MATCH THE HASHES",
        "{what} was stopped: a downloaded file is not the one that rigpanel was tested with. "
        "The package index or something in between serves another file.",
    ),
    (
        r"Temporary failure in name resolution|Name or service not known|NewConnectionError|ConnectTimeout|Max retries|"
        r"Connection refused|ReadTimeout|Network is unreachable|ProxyError|Could not fetch URL|SSLError",
        "{what} failed: the package index cannot be reached from this machine. Check the network, "
        "or pip's own settings where a mirror is used.",
    ),
    (
        r"requirement torch==\S+\+cpu",
        "{what} failed: torch's CPU build is not in the package index. Set PIP_FIND_LINKS to a folder with its wheel, "
        "or PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds, for the panel's process.",
    ),
    (
        r"Ignored the following versions that require a different python version|requires a different Python",
        "{what} failed: this version needs another Python than the {python} that the environment was made with.",
    ),
    (
        r"satisfies the requirement (?P<wanted>\S+) \(from versions: (?!none)",
        "{what} failed: there is no {wanted}, or none for this processor and Python.",
    ),
    (
        r"is not a supported wheel on this platform",
        "{what} failed: there is no build of it for this platform.",
    ),
    (
        r"No matching distribution found|Could not find a version",
        "{what} failed: the package index offers no file for this Python and processor, or it cannot be reached.",
    ),
    (
        r"ResolutionImpossible|conflicting dependencies",
        "{what} failed: these versions do not go together; ask for another one.",
    ),
    (r"Permission denied|Errno 13", "{what} failed: the data directory cannot be written."),
    (r"^Killed$|MemoryError", "{what} failed: the machine ran out of memory."),
)


def explain(failed: ChildFailed, what: str, python: str = "") -> str:
    """The sentence for a program that failed."""
    text = "\n".join(failed.tail)
    for pattern, sentence in CAUSES:
        if found := re.search(pattern, text, re.MULTILINE):
            return sentence.format(what=what, python=python or "Python", **found.groupdict())
    if failed.code is None:
        return f"{what} took too long and was stopped. The log shows how far it came."
    if failed.code < 0:
        return f"{what} was ended from outside with signal {-failed.code}."
    return f"{what} failed with exit code {failed.code}. The log has its last words."
