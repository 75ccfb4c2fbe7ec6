"""Command lines as a shell would cut them, without a shell: nothing is run, expanded by pattern or looked up.

Quotes, backslashes, continued lines, comments, assignments and the plain variables that the text itself sets are
understood; what only a shell could know (``$(...)``, backticks, variables from elsewhere) stays as it is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from apps.profiles.recipes.hidden import HIDDEN, is_secret_name
from apps.profiles.recipes.result import RecipeError

WORDS_MAX = 4000
EXPANDED_MAX = 20_000
ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)\Z", re.S)
VARIABLE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*)")
SEPARATORS = frozenset({"\n", ";", "&", "&&", "||", "|", "(", ")"})
SHELLS = frozenset({"sh", "bash", "dash", "ash", "zsh", "ksh"})
SHELL_WITH_VALUE = frozenset({"--rcfile", "--init-file"})


@dataclass(slots=True)
class Command:
    """``argv`` with the variables that the text sets put in; ``env`` what was assigned for it. ``unset`` names what
    only a shell could have known."""

    argv: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)
    redirected: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _Word:
    parts: list[tuple[str, str]] = field(default_factory=list)  # ("text" | "var" | "shell", what)

    def add(self, kind: str, text: str) -> None:
        if kind == "text" and self.parts and self.parts[-1][0] == "text":
            self.parts[-1] = ("text", self.parts[-1][1] + text)
        else:
            self.parts.append((kind, text))


def read_commands(text: str, given: Mapping[str, str] | None = None, *, script: bool = True) -> list[Command]:
    """All commands of a script, in order; ``given`` are the variables that it is started with.

    Without ``script`` the text is a command line that a file holds and no shell sees (compose, llama-swap): a line
    break in it is a blank, and # a character like others. Raises RecipeError for a quote that never ends or an
    endless list."""
    commands = []
    known: dict[str, str] = dict(given or {})
    exported: dict[str, str] = {}
    for words, redirected in _groups(text, script):
        command = Command(redirected=redirected)
        resolved = [_resolve(word, known, command.unset) for word in words]
        while resolved and (match := ASSIGNMENT.match(resolved[0])):
            command.env[match[1]] = match[2]
            resolved.pop(0)
        if resolved and resolved[0] in ("export", "declare"):
            named = {m[1]: m[2] for m in map(ASSIGNMENT.match, resolved[1:]) if m}
            known |= named
            exported |= named | {name: known[name] for name in resolved[1:] if name in known}
            continue
        if not resolved:  # assignments alone stay in force for the text itself
            known |= command.env
            if not command.env:
                continue
        else:
            command.env = {**exported, **command.env}
        command.argv = resolved
        commands.append(command)
    return commands


def shell_line(argv: Sequence[str]) -> tuple[str, list[str]] | None:
    """What ``bash -lc LINE NAME ...`` hands to the shell: the line and the words behind it. None for another program,
    or a shell without -c."""
    if not argv or argv[0].rsplit("/", 1)[-1] not in SHELLS:
        return None
    at, told = 1, False
    while at < len(argv) and argv[at][:1] in ("-", "+") and argv[at] != "--":
        word = argv[at]
        at += 1
        if word in SHELL_WITH_VALUE:
            at += 1
        elif not word.startswith("--"):
            told = told or (word[0] == "-" and "c" in word)
            at += sum(letter in "oO" for letter in word)  # -euo pipefail
    at += argv[at : at + 1] == ["--"]
    return (argv[at], list(argv[at + 1 :])) if told and at < len(argv) else None


def _groups(text: str, script: bool) -> Iterator[tuple[list[_Word], list[str]]]:
    words: list[_Word] = []
    redirected: list[str] = []
    skip_next = False
    for token in _tokens(text, script):
        if isinstance(token, str):
            if token in SEPARATORS:
                if words:
                    yield words, redirected
                words, redirected, skip_next = [], [], False
            else:
                redirected.append(token)
                skip_next = not token.endswith("&-")
        elif skip_next:
            redirected[-1] += " " + "".join(part for _, part in token.parts)
            skip_next = False
        else:
            words.append(token)
    if words:
        yield words, redirected


def _tokens(text: str, script: bool) -> Iterator[_Word | str]:
    """Words, and operators as plain strings."""
    word: _Word | None = None
    at, count, end = 0, 0, len(text)
    while at < end:
        char = text[at]
        if char == "\\" and not script and text[at + 1 : at + 2] == "\n":
            at += 1  # the line break is a blank like the others
        elif char == "\\":
            following = text[at + 1 : at + 2]
            if following != "\n":  # a continued line is no character at all
                word = word or _Word()
                word.add("text", following)
            at += 2
        elif char in "'\"":
            word = word or _Word()
            at = _quoted(text, at, word)
        elif char == "#" and word is None and script:
            at = end if (line := text.find("\n", at)) < 0 else line
        elif char == "$" or char == "`":
            word = word or _Word()
            at = _dollar(text, at, word)
        elif text.startswith(HIDDEN, at):  # a secret that was taken out is one word, brackets and all
            word = word or _Word()
            word.add("text", HIDDEN)
            at += len(HIDDEN)
        elif char.isspace() or char in ";&|<>()":
            if word is not None:
                digits = char in "<>" and len(word.parts) == 1 and word.parts[0][1] in ("1", "2")
                if not digits:  # the 2 of 2> belongs to the redirection
                    count += 1
                    if count > WORDS_MAX:
                        raise RecipeError(f"The text has more than {WORDS_MAX} words; paste less of it.")
                    yield word
                word = None
            if char == "\n" and script:
                yield "\n"
                at += 1
            elif char.isspace():
                at += 1
            else:
                run = re.match(r"[<>]+&?-?|&&|\|\||&>+|[;&|()]", text[at : at + 4])
                operator = run[0] if run else char
                yield ">" + operator[1:] if operator.startswith("&>") else operator
                at += len(operator)
        else:
            word = word or _Word()
            word.add("text", char)
            at += 1
    if word is not None:
        yield word


def _quoted(text: str, at: int, word: _Word) -> int:
    quote = text[at]
    at += 1
    word.add("text", "")
    while at < len(text):
        char = text[at]
        if char == quote:
            return at + 1
        if quote == '"' and char == "\\" and text[at + 1 : at + 2] in ("\\", '"', "$", "`", "\n"):
            if text[at + 1] != "\n":
                word.add("text", text[at + 1])
            at += 2
        elif quote == '"' and char in "$`":
            at = _dollar(text, at, word)
        else:
            word.add("text", char)
            at += 1
    raise RecipeError(f"A quotation mark ({quote}) is opened and never closed.")


def _dollar(text: str, at: int, word: _Word) -> int:
    if text[at] == "`":
        end = text.find("`", at + 1)
        end = len(text) if end < 0 else end + 1
        word.add("shell", text[at:end])
        return end
    if text.startswith("$(", at):
        depth, end = 0, at + 1
        while end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
            if depth == 0:
                break
        word.add("shell", text[at:end])
        return end
    match = VARIABLE.match(text, at + 1)
    if match:
        word.add("var", match[1] or match[2])
        return match.end()
    if text.startswith("${", at):
        end = text.find("}", at)
        end = len(text) if end < 0 else end + 1
        word.add("shell", text[at:end])
        return end
    word.add("text", "$")
    return at + 1


def _resolve(word: _Word, known: dict[str, str], unset: list[str]) -> str:
    out = []
    for kind, what in word.parts:
        if kind == "text":
            out.append(what)
        elif kind == "var" and what in known:
            out.append(HIDDEN if is_secret_name(what) else known[what])
        else:
            written = f"${{{what}}}" if kind == "var" else what
            unset.append(written)
            out.append(written)
        if sum(map(len, out)) > EXPANDED_MAX:
            raise RecipeError("A word becomes too long once its variables are put in.")
    return "".join(out)
