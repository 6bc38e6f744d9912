"""A Python that starts in a moment: forked from a process that has torch, MONAI and Jupyter's kernel loaded.

A run of the tests starts some fifty Pythons, and each takes 6 to 10 s of processor time to import these libraries.
Tests write `*PYTHON` for `sys.executable`; the run of all tests starts the process to fork from (conftest.py), and
where there is none, as in a run of one file, the interpreter starts as usual. The server that workers of `Processes`
are forked from is forked as well. fedlab itself is not loaded before the fork, and is imported as it is found.

Not for tests of what depends on a new interpreter: modules loaded, memory, hash seeds, process groups, settings of
libraries in the environment.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import fcntl
import gc
import importlib
import json
import logging
import multiprocessing
import os
import runpy
import select
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

#: Names the socket of the process to fork from.
SOCKET = "FEDLAB_TEST_WARM"
#: Beside the socket: what multiprocessing takes for the Python that starts servers of workers.
PROGRAM = """#!/bin/sh
case "$*" in
  *multiprocessing.forkserver*) exec {python} "$@" ;;
  *) exec {real} "$@" ;;
esac
"""
#: What a test writes for `sys.executable`. The client itself needs no library.
PYTHON = (sys.executable, "-I", "-S", str(Path(__file__).resolve()))
LIBRARIES = ("torch", "torch._dynamo", "torch.optim", "monai", "opacus", "pandas", "matplotlib.pyplot", "nibabel",
             "ipykernel.kernelapp", "ipykernel.ipkernel", "ipywidgets", "anywidget", "jinja2")
#: Chosen when imported, for a terminal or for a notebook, so each process imports them itself.
CHOSEN = ("tqdm.auto", "tqdm.autonotebook")
LENGTH = struct.Struct("!I")
#: More open files than a client has.
FILES = 64


# The process to fork from

def start(folder: Path) -> subprocess.Popen[bytes]:
    """Starts it; its children end with it. It listens at once, and loads the libraries meanwhile."""
    address = folder / "warm"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(address))
    listening.listen(64)
    program = Path(f"{address}-python")
    program.write_text(PROGRAM.format(python=shlex.join(PYTHON), real=shlex.quote(sys.executable)), encoding="utf-8")
    program.chmod(0o755)
    with listening:
        server = subprocess.Popen([sys.executable, __file__, str(listening.fileno())], pass_fds=[listening.fileno()],
                                  stdin=subprocess.DEVNULL, start_new_session=True)
    os.environ[SOCKET] = str(address)
    return server


def servers_of_workers() -> None:
    """Has the servers that workers of this process are forked from forked too, where there is what to fork from."""
    if address := os.environ.get(SOCKET):
        multiprocessing.set_executable(f"{address}-python")


def stop(server: subprocess.Popen[bytes]) -> None:
    """Ends it, and with it whatever was forked from it and still runs."""
    os.environ.pop(SOCKET, None)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def serve(listening: socket.socket) -> dict[str, Any]:
    """Forks for every client, for ever; returns in the process that is to do what the client asks."""
    for name in LIBRARIES:
        importlib.import_module(name)
    for name in CHOSEN:
        sys.modules.pop(name, None)
    logging.root.handlers.clear()  # Opacus sets one when imported, which would write into cells of notebooks
    gc.collect()
    gc.freeze()  # the collector of a child leaves alone what was there before it, and memory stays shared
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the watchers are not waited for
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(client)
        client.close()


def watch(client: socket.socket) -> dict[str, Any]:
    """Forks once more and stands between the two: signals one way, the end the other. Returns in the child."""
    asked, files = receive(client)
    child = os.fork()
    if child == 0:
        client.close()
        aside = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 1000) for file in files]  # no number that is wanted
        for file in files:
            os.close(file)
        for number, file in zip(asked["files"], aside, strict=True):
            os.dup2(file, number)
            os.close(file)
        return asked
    for file in files:
        os.close(file)
    ended = os.pidfd_open(child)
    while True:
        ready, _, _ = select.select([ended, client], [], [])
        if ended in ready:
            _, status = os.waitpid(child, 0)
            client.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            os._exit(0)
        sent = client.recv(1)
        os.kill(child, sent[0] if sent else signal.SIGKILL)  # a client that was killed sends no more
        if not sent:
            os.waitpid(child, 0)
            os._exit(0)


def receive(client: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """What a client asks, and its open files."""
    files = array.array("i")
    head, control, _, _ = client.recvmsg(LENGTH.size, socket.CMSG_LEN(FILES * files.itemsize))
    for level, kind, content in control:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(content)
    (left,) = LENGTH.unpack(head)
    parts = []
    while left:
        parts.append(client.recv(left))
        if not parts[-1]:
            sys.exit("the client ended before it had asked")
        left -= len(parts[-1])
    return json.loads(b"".join(parts)), list(files)


# A client

def inherited() -> list[int]:
    """Files that this process was given beside the standard ones."""
    found = []
    for number in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # of the listing itself
            if number > 2 and os.get_inheritable(number):
                found.append(number)
    return found


def ask(address: str, arguments: list[str]) -> NoReturn:
    """Has a forked process do what `python *arguments` does, and ends as it ends."""
    files = [0, 1, 2, *inherited()]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.connect(address)
        what = {"argv": arguments, "cwd": os.getcwd(), "environ": dict(os.environ), "files": files}
        asked = json.dumps(what).encode()
        socket.send_fds(server, [LENGTH.pack(len(asked))], files)
        server.sendall(asked)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        answer = server.recv(4)
    code = struct.unpack("!i", answer)[0] if answer else -signal.SIGKILL
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


# The forked process

def become(asked: dict[str, Any]) -> None:
    """Does what `python *asked["argv"]` does in a new interpreter."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(asked["cwd"])
    os.environ.clear()
    os.environ.update(asked["environ"])
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        mode, errors = ("r", None) if number == 0 else ("w", "backslashreplace" if number == 2 else None)
        stream = open(number, mode, encoding="utf-8", errors=errors, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    sys.stdout.reconfigure(line_buffering=sys.stdout.isatty())
    sys.stderr.reconfigure(line_buffering=True)
    import matplotlib
    import numpy as np

    np.random.seed()
    matplotlib.rcParams["backend"] = os.environ.get("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    servers_of_workers()
    arguments = asked["argv"]
    kind, *rest = arguments[next(k for k, one in enumerate(arguments) if one in ("-c", "-m", "-") or one[0] != "-"):]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[0:1] = ["" if kind in ("-c", "-m", "-") else str(Path(kind).resolve().parent), *paths]
    if kind in ("-c", "-"):
        code, *rest = rest if kind == "-c" else (sys.stdin.read(), *rest)
        sys.argv = [kind, *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>" if kind == "-c" else "<stdin>", "exec"), main.__dict__)
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [kind, *rest]
        runpy.run_path(kind, run_name="__main__")


def end(asked: dict[str, Any]) -> NoReturn:
    """Does it and ends, without taking thousands of modules down one by one."""
    code: Any = 0
    try:
        become(asked)
    except SystemExit as left:
        code = left.code
    except BaseException as error:
        traceback.print_exception(error)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    warnings.simplefilter("ignore")  # those of what libraries do at the end would count as of this file, and be shown
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    if code is not None and code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code or 0)


if __name__ == "__main__":
    address = os.environ.get(SOCKET)
    if len(sys.argv) == 2 and sys.argv[1].isdigit():
        end(serve(socket.socket(fileno=int(sys.argv[1]))))
    elif address:
        ask(address, sys.argv[1:])
    else:
        os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
