"""Backups that cannot be restored, each made from a good one. Nothing here imports Django."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

Members = dict[str, bytes]


def rewrite(source: Path, target: Path, change: Callable[[Members], None]) -> None:
    """Write ``target``: the members of ``source`` by name, after ``change``."""
    with tarfile.open(source) as archive:
        members = {m.name: content.read() for m in archive if (content := archive.extractfile(m)) is not None}
    change(members)
    with tarfile.open(target, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def of_another_schema(members: Members) -> None:
    manifest = json.loads(members["manifest.json"])
    manifest["schema"] = manifest["schema"][1:]
    members["manifest.json"] = json.dumps(manifest).encode()


def another_schema(source: Path, target: Path) -> None:
    rewrite(source, target, of_another_schema)


def without_secrets(source: Path, target: Path) -> None:
    rewrite(source, target, lambda members: members.__delitem__("secrets.json"))


def half_of_the_secrets(source: Path, target: Path) -> None:
    rewrite(source, target, lambda members: members.update({"secrets.json": b'{"secret_key": "abc"}'}))


def without_the_last_row(source: Path, target: Path) -> None:
    def change(members: Members) -> None:
        members["data.jsonl"] = b"".join(members["data.jsonl"].splitlines(keepends=True)[:-1])

    rewrite(source, target, change)


def an_entry_twice(source: Path, target: Path) -> None:
    """Whole, and of the right schema: that a row does not fit is seen only when it is inserted."""

    def change(members: Members) -> None:
        lines = [json.loads(line) for line in members["data.jsonl"].splitlines()]
        lines.append(next(line for line in lines if line["model"] == "audit.auditentry") | {"pk": None})
        manifest = json.loads(members["manifest.json"])
        members["manifest.json"] = json.dumps(manifest | {"rows": len(lines)}).encode()
        members["data.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    rewrite(source, target, change)


def no_row(source: Path, target: Path) -> None:
    def change(members: Members) -> None:
        lines = members["data.jsonl"].splitlines(keepends=True)
        members["data.jsonl"] = b"".join([*lines[:-1], b'"hello"\n'])

    rewrite(source, target, change)


def cut_short(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:-4096])


def without_its_last_bytes(source: Path, target: Path) -> None:
    """Only gzip's own check sum is missing."""
    target.write_bytes(source.read_bytes()[:-8])


def one_byte_changed(source: Path, target: Path) -> None:
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 0xFF
    target.write_bytes(content)


# What the refusal says, in lower case.
DAMAGES: dict[Callable[[Path, Path], None], str] = {
    another_schema: "another schema",
    without_secrets: "no secrets.json",
    half_of_the_secrets: "api_key_pepper",
    without_the_last_row: "cut short",
    no_row: "damaged",
    an_entry_twice: "unique constraint",
    cut_short: "damaged",
    without_its_last_bytes: "damaged",
    one_byte_changed: "damaged",
}
