"""Kind ``download``: one repository's files onto this rig's disk, carried on where an earlier run stopped."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from django.conf import settings

from apps.catalog.models import Model
from apps.catalog.services import weights_register
from apps.catalog.weights import fetch
from apps.catalog.weights.choose import Choice, NothingToChoose, RepoFile, choose
from apps.catalog.weights.inspect import look_at
from apps.catalog.weights.token import hub_token
from apps.common.actors import Actor
from apps.common.errors import Invalid
from apps.jobs import child
from apps.jobs.handlers import JobFailed, Step
from apps.jobs.models import Job
from apps.jobs.runner import JobContext

GIB = 2**30
RESERVE_BYTES = 2 * GIB  # left free for databases, logs and other people
FLOOR_BYTES = GIB // 2  # while it runs: below this somebody else fills the disk too, and it stops
LIST_SECONDS = 300.0
FETCH_SECONDS = 7 * 24 * 3600.0
SAVE_SECONDS = 1.0
SPEED_WINDOW_SECONDS = 15.0
_QUERY = re.compile(r"\?\S+")  # signed addresses of a content network are keys for an hour

SENTENCES = {
    "gated": "{repo} is gated: its owner gives access on request. Ask there, then store a token of that account.",
    "no_repository": "The hub has no {repo} that this panel may see. Check the name; a private one needs a token.",
    "no_revision": "{repo} has no branch, tag or commit {revision}.",
    "no_file": "{repo} no longer has one of the files that it listed.",
    "bad_token": "The hub does not accept the stored token. Make a new one and store it.",
    "forbidden": "The token may not read {repo}. It needs the right to read the contents of this repository.",
    "rate_limited": "The hub says this rig is asking too often (429). Try again later; with a token it allows more.",
    "hub_error": "The hub answered with an error ({detail}). That is usually over soon; try again.",
    "no_network": "The hub cannot be reached from this rig ({detail}). Check the network, a proxy or HF_ENDPOINT.",
    "not_a_hub": "What answers at the hub's address is not a hub. Check HF_ENDPOINT and the proxy.",
    "bad_name": "{repo} is not the name of a repository.",
    "locked": "Another download writes into the same folder.",
    "checksum": "{detail} arrived twice with a wrong checksum and was thrown away. Something on the way changes it.",
    "too_long": "The hub sent more than it announced; what arrived is kept, and nothing was registered.",
    "disk": "The models folder cannot be written: {detail}.",
}
KEPT = "What arrived is kept; the next download carries on from there."


class DownloadHandler:
    kind = "download"

    def steps(self, job: Job) -> Sequence[Step]:
        return (
            Step("ask", "Ask the hub what there is", ask_hub, weight=2),
            Step("disk", "Look at the disk", check_disk, weight=0.1),
            Step("fetch", "Fetch the files", fetch_files, weight=600),
            Step("register", "Check and register", register, weight=1, cancellable=False),
        )

    def compensation(self, job: Job) -> Sequence[Step]:
        return (Step("keep", "Note what arrived", note_what_arrived, weight=0.1),)

    def summary(self, job: Job) -> dict[str, Any]:
        data = job.data
        return {
            "summary": f"{job.params['repo']} is on {job.rig_name}: {size(data['size_bytes'])} in {data['path']}.",
            "revision": data["revision"],
            "path": data["path"],
        }


def size(value: float) -> str:
    return f"{value / GIB:.1f} GiB" if value >= GIB / 10 else f"{value / 2**20:.1f} MiB"


def folder_of(model_slug: str, revision: str) -> Path:
    """Each revision lies in a folder of its own, so that a newer one never changes what an engine has open."""
    return Path(settings.MODELS_DIR) / model_slug / revision[:12]


def run_fetch(context: JobContext, request: Mapping[str, Any], on_event: Any, timeout_seconds: float) -> None:
    """Run the program beside this worker and hand its events on. Raises JobFailed with the sentence."""
    failure: dict[str, Any] = {}

    def on_line(line: str) -> None:
        try:
            event = json.loads(line)
            name = str(event.pop("event"))
        except (ValueError, KeyError, AttributeError, TypeError):
            context.log(_QUERY.sub("?…", line))
            return
        if name == "error":
            failure.update(event)
        else:
            on_event(name, event)

    home = Path(settings.DATA_DIR) / "cache" / "hub"
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    argv = [sys.executable, "-I", str(Path(fetch.__file__).resolve())]
    secret = json.dumps({**request, "token": hub_token()})
    try:
        child.run(
            context,
            argv,
            on_line=on_line,
            timeout_seconds=timeout_seconds,
            stdin=secret,
            environment={"HF_HOME": str(home)},
        )
    except child.ChildFailed as failed:
        raise JobFailed(sentence(context.job, failure), cause=str(failure.get("kind", "unknown"))) from (
            None if failure else failed
        )


def sentence(job: Job, failure: Mapping[str, Any]) -> str:
    kind, detail = str(failure.get("kind", "")), str(failure.get("detail", ""))
    params = job.params
    if kind == "disk_full":
        total, done = int(job.data.get("size_bytes", 0)), sum(job.data.get("done", {}).values())
        free = f" and {size(float(detail))} are free" if detail not in ("", "0") else ""
        return f"The disk is full: {size(max(0, total - done))} are still to come{free}. Make room. {KEPT}"
    if kind not in SENTENCES:
        return f"The download ended without saying why{': ' + detail if detail else ''}. The log has its last words."
    return SENTENCES[kind].format(repo=params["repo"], revision=params.get("revision") or "main", detail=detail)


def ask_hub(context: JobContext) -> str:
    params = context.job.params
    listed: list[RepoFile] = []
    found: dict[str, Any] = {}

    def on_event(name: str, event: dict[str, Any]) -> None:
        if name == "listed":
            listed.append(RepoFile(event["name"], event["size_bytes"], event["sha256"], event["blob_id"]))
        elif name == "commit":
            found.update(event)
        elif name == "retry":
            context.progress(0.5, detail=event["why"])

    request = {"do": "list", "repo": params["repo"], "revision": params.get("revision", "")}
    run_fetch(context, request, on_event, LIST_SECONDS)
    if not re.fullmatch(r"[0-9a-f]{7,64}", found.get("sha", "")):
        raise JobFailed("The hub did not say which commit this is; nothing can be pinned to it.", cause="not_a_hub")
    try:
        choice = choose(listed, str(params.get("quantization", "")))
    except NothingToChoose as no:
        raise JobFailed(str(no), cause="nothing_to_choose") from None
    remember(context, choice, str(found["sha"]))
    return f"{len(choice.files)} files, {size(choice.size_bytes)}, commit {found['sha'][:12]}"


def remember(context: JobContext, choice: Choice, revision: str) -> None:
    folder = folder_of(str(context.job.params["model"]), revision)
    context.save_data(
        revision=revision,
        kind=choice.kind,
        quantization=choice.quantization,
        folder=str(folder),
        path=str(folder / choice.entry) if choice.entry else str(folder),
        size_bytes=choice.size_bytes,
        files=[
            {"name": f.name, "size_bytes": f.size_bytes, "sha256": f.sha256, "blob_id": f.blob_id} for f in choice.files
        ],
        done={},
    )


def arrived(folder: Path, files: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Bytes on the disk per file, whole ones and the beginnings of others."""
    found = {}
    for file in files:
        target = folder / file["name"]
        for place in (target, target.with_name(target.name + fetch.PART)):
            try:
                found[str(file["name"])] = min(place.stat().st_size, int(file["size_bytes"]))
                break
            except OSError:
                continue
    return found


def check_disk(context: JobContext) -> str:
    data = context.job.data
    folder = Path(data["folder"])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise JobFailed(f"{error.filename or folder} cannot be used: {error.strerror}.", cause="disk") from error
    done = arrived(folder, data["files"])
    context.save_data(done=done)
    need = data["size_bytes"] - sum(done.values())
    if free < need + RESERVE_BYTES:
        raise JobFailed(
            f"The disk is too full: {size(need)} are needed beside {size(RESERVE_BYTES)} that stay free, and "
            f"{size(free)} are free at {settings.MODELS_DIR}. Delete weights that nobody uses, then try again.",
            cause="disk_full",
        )
    return f"{size(need)} to fetch, {size(free)} free" + (f", {size(sum(done.values()))} already here" if done else "")


class Progress:
    """Turns the program's counts into a fraction, a speed and a time left."""

    def __init__(self, context: JobContext) -> None:
        self.context = context
        self.total = max(1, int(context.job.data["size_bytes"]))
        self.done: dict[str, int] = dict(context.job.data.get("done", {}))
        self.seen: deque[tuple[float, int]] = deque([(time.monotonic(), sum(self.done.values()))])
        self.saved_at = 0.0

    def on_event(self, name: str, event: dict[str, Any]) -> None:
        if name == "progress":
            self.done |= {str(k): int(v) for k, v in event["files"].items()}
            self.show()
        elif name == "retry":
            self.context.log(f"{event['name'] or 'The hub'}: {event['why']}, carrying on at {size(event['at'])}.")
        elif name == "file":
            words = {
                "done": "arrived, checksum right",
                "there": "is already here",
                "resumed": f"is carried on at {size(event.get('at', 0))}",
                "checksum": "arrived with a wrong checksum and was thrown away",
            }
            self.context.log(f"{event['name']} {words[event['state']]}.")

    def speed(self) -> float | None:
        """Bytes per second over the last seconds; None until something can be said."""
        now, done = time.monotonic(), sum(self.done.values())
        self.seen.append((now, done))
        while len(self.seen) > 2 and now - self.seen[0][0] > SPEED_WINDOW_SECONDS:
            self.seen.popleft()
        (since, before), passed = self.seen[0], now - self.seen[0][0]
        return max(0.0, (done - before) / passed) if passed > 0.5 and since < now else None

    def show(self) -> None:
        speed = self.speed()
        done = sum(self.done.values())
        now = time.monotonic()
        if now - self.saved_at < SAVE_SECONDS:
            return
        self.saved_at = now
        self.context.save_data(done=self.done, speed=speed)
        detail = f"{size(done)} of {size(self.total)}"
        left = None
        if speed:
            left = (self.total - done) / speed
            detail += f", {speed / 1e6:.1f} MB/s"
        self.context.progress(done / self.total, detail=detail, eta_seconds=left)


def fetch_files(context: JobContext) -> str:
    data = context.job.data
    progress = Progress(context)
    begun = time.monotonic()
    before = sum(progress.done.values())
    request = {
        "do": "fetch",
        "repo": context.job.params["repo"],
        "revision": data["revision"],
        "folder": data["folder"],
        "files": data["files"],
        "reserve_bytes": FLOOR_BYTES,
    }
    try:
        run_fetch(context, request, progress.on_event, FETCH_SECONDS)
    finally:
        if not context.lost:
            context.save_data(done=arrived(Path(data["folder"]), data["files"]), speed=None)
    fetched = data["size_bytes"] - before
    seconds = max(0.01, time.monotonic() - begun)
    return f"{size(fetched)} in {seconds:.0f} s, {fetched / 1e6 / seconds:.1f} MB/s; every checksum is right"


def register(context: JobContext) -> str:
    job, data = context.job, context.job.data
    try:
        found = look_at(data["path"])
    except Invalid as no:
        raise JobFailed(f"Everything arrived, but no engine could load it. {no.message}", cause="unusable") from None
    model = Model.objects.filter(slug=job.params["model"]).first()
    if model is None:
        raise JobFailed("The model left the catalogue meanwhile; the files are on the disk.", cause="model_gone")
    weights_register(
        model,
        rig_name=job.rig_name,
        path=data["path"],
        size_bytes=data["size_bytes"],
        actor=Actor("", job.user_name, job.user_id),
        kind=found.kind,
        quantization=data["quantization"],
        repo=job.params["repo"],
        revision=data["revision"],
    )
    return str(data["path"])


def note_what_arrived(context: JobContext) -> str:
    child.end_leftover(context)
    data = context.job.data
    kept = sum(arrived(Path(data["folder"]), data["files"]).values()) if "files" in data else 0
    context.save_data(child=None, aftermath=f"{size(kept)} of {size(data['size_bytes'])} are kept." if kept else "")
    return f"{size(kept)} kept"
