"""A table of what a log line means: each adapter lists (pattern, builder) from specific to general.

A builder is ``words(...)`` where one sentence fits every match, else a function of the match.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

from apps.engines.protocol import Cause, Diagnosis

Builder = Callable[[re.Match[str]], Diagnosis]
Table = Sequence[tuple[re.Pattern[str], Builder]]

EVIDENCE_LINES = 4
EVIDENCE_COLUMNS = 600
TAIL_CHARACTERS = 400_000  # a start's whole log is far shorter; a long-lived engine's is not

QUOTED_CHARACTERS = 300
ERROR_LINE = re.compile(r"\b(ERROR|Error|error:|Exception|FATAL|fatal)\b|^\S+ E ")
# Traceback and wrapper lines that repeat a root cause without naming it.
NOISE = re.compile(r"Engine core initialization failed|^\s*File \"|^\s*\^+\s*$|Traceback")


def diagnose_by_table(table: Table, log: str, exit_code: int | None, engine: str) -> Diagnosis:
    """The first pattern of ``table`` that occurs in the log wins; its last occurrence is used,
    since an engine that was restarted in place ends with the newest. Without a match the exit
    code speaks: a signal, an ordinary end, or unknown."""
    log = log[-TAIL_CHARACTERS:]
    for pattern, build in table:
        matches = list(pattern.finditer(log))
        if matches:
            found = build(matches[-1])
            evidence = found.evidence or _lines_around(log, matches[-1])
            return Diagnosis(found.cause, found.summary, evidence, found.suggestion, dict(found.suggested_options))
    return _by_exit_code(log, exit_code, engine)


def _by_exit_code(log: str, exit_code: int | None, engine: str) -> Diagnosis:
    evidence = last_error_lines(log)
    if exit_code is None:
        return Diagnosis(Cause.UNKNOWN, f"{engine} ended and left no known reason in its log.", evidence)
    if exit_code < 0:
        name = signal.Signals(-exit_code).name if -exit_code in set(signal.Signals) else str(-exit_code)
        if exit_code == -signal.SIGKILL:
            return killed(engine, evidence)
        if exit_code == -signal.SIGTERM:
            return Diagnosis(Cause.KILLED, f"{engine} was asked to stop ({name}).", evidence)
        return Diagnosis(
            Cause.CRASHED,
            f"{engine} crashed with {name}.",
            evidence,
            "A crash in native code often means a driver or library that does not fit this build.",
        )
    if exit_code == 0:
        return Diagnosis(Cause.UNKNOWN, f"{engine} ended with exit code 0, as after an ordinary stop.", evidence)
    return Diagnosis(
        Cause.UNKNOWN,
        f"{engine} ended with exit code {exit_code} for a reason that is not recognised; read the end of its log.",
        evidence,
    )


def killed(who: str, evidence: tuple[str, ...] = ()) -> Diagnosis:
    return Diagnosis(
        Cause.KILLED,
        f"{who} was killed (SIGKILL): most often by the kernel because the host ran out of memory, or by a person.",
        evidence,
        "Look for 'Out of memory' in the kernel log, and leave more host memory free.",
    )


def last_error_lines(log: str, count: int = EVIDENCE_LINES) -> tuple[str, ...]:
    """The last lines that speak of an error, or the last lines at all."""
    lines = [line.strip()[:EVIDENCE_COLUMNS] for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if ERROR_LINE.search(line) and not NOISE.search(line)]
    return tuple((errors or lines)[-count:])


def _lines_around(log: str, match: re.Match[str]) -> tuple[str, ...]:
    begin = log.rfind("\n", 0, match.start()) + 1
    end = log.find("\n", match.end())
    text = log[begin : end if end >= 0 else len(log)]
    return tuple(line.strip()[:EVIDENCE_COLUMNS] for line in text.splitlines() if line.strip())[:EVIDENCE_LINES]


def words(cause: Cause, summary: str, suggestion: str, **suggested_options: Any) -> Builder:
    """A builder of fixed words. ``{0}`` in ``summary`` stands for the matched text, ``{1}`` for its first group; both
    are cut to ``QUOTED_CHARACTERS``, without spaces and full stops around them."""

    def build(match: re.Match[str]) -> Diagnosis:
        quoted = [(text or "").strip(" .\n")[:QUOTED_CHARACTERS] for text in (match[0], *match.groups())]
        return Diagnosis(
            cause, summary.format(*quoted), suggestion=suggestion, suggested_options=dict(suggested_options)
        )

    return build


# A file of /dev/shm takes memory, not room on a disk: as NCCL (shmutils.cc) and PyTorch (MapAllocator.cpp) say it.
DISK_FULL: Table = (
    (
        re.compile(
            r"(?:shared memory segment|shared memory file|failed to extend) /dev/shm/[^\n]*No space left on device|"
            r"unable to allocate shared memory\(shm\) for file <[^\n]*No space left on device"
        ),
        words(
            Cause.DISK_FULL,
            "The host's shared memory (/dev/shm) is full, or too small for what the engine's processes exchange.",
            "Look at df -h /dev/shm: delete what engines that were killed left there (nccl-…, torch_…), or make it "
            "larger; in a container --shm-size=16g, or shm_size in its compose file.",
        ),
    ),
    (
        re.compile(r"No space left on device"),
        words(
            Cause.DISK_FULL,
            "The disk is full: the engine could not write.",
            "Free space where models and caches lie, then try again.",
        ),
    ),
)
