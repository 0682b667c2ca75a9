"""Starts servers that are loaded already, for tests (`warm`): it loads gunicorn and all of the product, then forks.

Each connection to its socket is one process: it says on a line what is wanted, is told the pid, and at the end the
status. From its first own line on a server is what `python -m gunicorn` makes: master, workers, their settings; and a
simulator what `python cli.py sandbox` makes.
"""

# ruff: noqa: E402
from __future__ import annotations

from functools import cache
from importlib import metadata

metadata.entry_points = cache(metadata.entry_points)  # gevent looks for its plugins thirty times whenever it patches

from gevent import events, monkey

# What modules take hold of as they are loaded. The rest is patched in each worker, as usual: the master needs it bare.
monkey.patch_thread()
monkey.patch_socket()
monkey.patch_ssl()
monkey.patch_select()

import ctypes
import faulthandler
import gc
import json
import os
import runpy
import signal
import socket
import sys
from importlib import import_module, reload
from pkgutil import walk_packages

from gunicorn import config
from sqlalchemy.sql import Executable

import abhiapi
from abhiapi import db_sqlite, draining, pricing
from tests import cheap_passwords

fork, waitpid = monkey.get_original("os", ["fork", "waitpid"])
plain_select = monkey.get_original("select", "select")
plain_socket = monkey.get_original("socket", "socket")
CLONE_NEWNET = 0x40000000  # linux/sched.h
READ_AT_IMPORT = {"abhiapi.wsgi", "abhiapi.gunicorn_config"}  # of the settings: each server loads these itself


def main(path: str) -> None:
    load()
    listener = plain_socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    print("listening", flush=True)
    while listener in plain_select([listener, sys.stdin], [], [])[0]:  # stdin ends with whoever started this
        connection, _ = listener.accept()
        if not fork():
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(connection)
            os._exit(0)
        connection.close()


def load() -> None:
    for module in ("gunicorn.app.wsgiapp", "psycopg"):
        import_module(module)
    for found in walk_packages(abhiapi.__path__, "abhiapi."):
        if found.name not in READ_AT_IMPORT and not found.name.endswith(".__main__"):
            import_module(found.name)
    cheap_passwords.make_usual()
    for event in vars(events).values():
        if group := getattr(event, "ENTRY_POINT_NAME", None):
            metadata.entry_points(group=group)
    pricing.shipped_rules()
    ours = [vars(module) for name, module in sys.modules.items() if name.startswith("abhiapi.")]
    for statement in [value for names in ours for value in names.values() if isinstance(value, Executable)]:
        db_sqlite.compile_once(statement)
    gc.collect()
    gc.freeze()  # shared with every server


def keep(connection: socket.socket) -> None:
    """Be the parent of one process."""
    wanted = json.loads(connection.makefile().readline())
    pid = fork()
    if not pid:
        connection.close()
        become(**wanted)
        sys.exit()
    connection.sendall(f"{pid}\n".encode())
    ended = os.pidfd_open(pid)
    if ended not in plain_select([ended, connection], [], [])[0]:  # whoever started it is gone, without a word
        os.killpg(pid, signal.SIGKILL)
    _, status = waitpid(pid, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(arguments: list[str], env: dict[str, str], cwd: str, log: str, namespace: str) -> None:
    """Go on as `python ARGUMENTS` does, in a session of its own."""
    os.setsid()
    if namespace:
        enter(f"/run/netns/{namespace}")
    for number, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.dup2(1, 2)
    faulthandler.enable()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[0] = cwd
    config.Chdir.default = cwd  # it remembers where it was loaded
    reload(draining)  # which shares a byte with all that is forked from it
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


def enter(namespace: str) -> None:
    """Go to another network (setns(2), which Python has from 3.12 on)."""
    opened, libc = os.open(namespace, os.O_RDONLY), ctypes.CDLL(None, use_errno=True)
    if libc.setns(opened, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    os.close(opened)


if __name__ == "__main__":
    main(sys.argv[1])
