"""`python -m abhiapi.sandbox --fd N --until-parent-ends`: the simulator as the child of `serve --sandbox`."""

from __future__ import annotations

import argparse
import os
import socket

import gevent
from gevent.socket import socket as gevent_socket

from abhiapi.pricing import shipped_rules
from abhiapi.sandbox import create_sandbox
from abhiapi.sandbox.server import serve_on

PARENT_LOOK_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--until-parent-ends", action="store_true")
    wanted = parser.parse_args()
    parent = os.getppid()
    listener = gevent_socket(socket.AF_INET, socket.SOCK_STREAM, fileno=wanted.fd)
    serve_on(listener, create_sandbox(shipped_rules()))
    while not wanted.until_parent_ends or os.getppid() == parent:
        gevent.sleep(PARENT_LOOK_S)


main()
