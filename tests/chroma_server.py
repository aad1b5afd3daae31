"""A real Chroma server on loopback that can be killed, frozen and started again; and a proxy before it that wants a token."""

import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BINARY = Path(sys.executable).parent / "chroma"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ChromaServer:
    """`chroma run` on a port that stays the same, whatever folder it is started with."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = None

    def start(self, folder=None):
        self.folder = folder or self.folder
        command = [str(BINARY), "run", "--path", str(self.folder), "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 30
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/api/v2/heartbeat", timeout=1):
                    return self
            except OSError:
                assert self.process.poll() is None, "the server ended"
                assert time.monotonic() < end, "the server does not come up"
                time.sleep(0.02)

    def kill(self):
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self):
        """Let it take connections and answer nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self):
        self.process.send_signal(signal.SIGCONT)


class Proxy:
    """Passes requests on to a server if `allows` says so of their headers; keeps the headers. May fail, or refuse long bodies.

    What it refuses it answers as a careless proxy does: with the header that it did not like.
    """

    def __init__(self, target, *, allows=lambda headers: True):
        self.allows, self.headers, self.fails, self.longest = allows, [], False, None
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def pass_on(self):
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                proxy.headers.append(dict(self.headers))
                if proxy.fails:
                    return self.reply(502, b"<html>Bad Gateway</html>")
                if not proxy.allows(self.headers):
                    return self.reply(401, f"no entry with {self.headers.get('Authorization')}".encode())
                if proxy.longest is not None and len(body) > proxy.longest:
                    return self.reply(413, b"<html>Request Entity Too Large</html>")
                kept = {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")}
                request = urllib.request.Request(target + self.path, body or None, kept, method=self.command)
                try:
                    with urllib.request.urlopen(request, timeout=10) as answer:
                        return self.reply(answer.status, answer.read())
                except urllib.error.HTTPError as error:
                    return self.reply(error.code, error.read())

            do_GET = do_POST = do_PUT = do_DELETE = pass_on

            def reply(self, status, body):
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
