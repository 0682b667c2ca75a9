"""A real Redis of the tests' own, which can be frozen, killed and started again, and a wire to it that can be held."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import redis

from tests.harness import free_port, until

DATABASES = 256


@dataclass
class RedisServer:
    """One redis-server on loopback, which writes nothing to disk."""

    folder: Path
    port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=lambda: count(0))

    @classmethod
    @contextmanager
    def started(cls, folder: Path) -> Iterator[RedisServer]:
        assert shutil.which("redis-server"), "install redis-server (tools/servers does, as root on Debian)"
        server = cls(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()

    def url(self) -> str:
        """An empty database of this server that nobody else has had."""
        return f"redis://127.0.0.1:{self.port}/{next(self._numbers) % DATABASES}"

    def start(self) -> None:
        options = {"port": self.port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "databases": DATABASES}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with open(self.folder / "redis.log", "ab") as log:
            self._process = subprocess.Popen(["redis-server", *words], cwd=self.folder, stdout=log, stderr=log)
        until(self._answers, what="Redis answers")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def freeze(self) -> None:
        """It keeps its connections, takes new ones, and answers nobody."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def set(self, name: str, value: str) -> None:
        with redis.Redis(port=self.port) as client:
            client.config_set(name, value)

    def names(self) -> list[bytes]:
        """The keys of its first database."""
        with redis.Redis(port=self.port) as client:
            found: list[bytes] = client.keys()
        return found

    def _answers(self) -> bool:
        try:
            with redis.Redis(port=self.port) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False


class Relay:
    """A wire to a server on loopback. While it is held, what Redis says goes no further; nothing is lost."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        """Listens at an address of ``host`` for what is meant for a port of loopback."""
        self._to = port
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self._flows = threading.Event()
        self._flows.set()
        self.open_now = 0
        self.open_most = 0
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        self._flows.clear()

    def release(self) -> None:
        self._flows.set()

    def close(self) -> None:
        self._flows.set()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to))
            except OSError:  # it is down just now
                near.close()
                continue
            with self._lock:
                self.open_now += 1
                self.open_most = max(self.open_most, self.open_now)
            threading.Thread(target=self._pump, args=(near, far, False), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, True), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_held: bool) -> None:
        try:
            while piece := source.recv(65536):
                if is_held:
                    self._flows.wait()
                sink.sendall(piece)
        except OSError:
            pass  # one side is gone, and so is the other
        finally:
            if not is_held:
                with self._lock:
                    self.open_now -= 1
            for end in (source, sink):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            if is_held:
                source.close()
                sink.close()
