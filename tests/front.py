"""The front of docker-compose: nginx with the configuration of deploy/, on loopback before a real API."""

import subprocess
from pathlib import Path

from conftest import ROOT, free_port, until
from wire import exchange, head

DEPLOY = ROOT / "deploy"
NGINX = ROOT / ".venv" / "nginx"  # .ci/setup unpacks it here, with its C library and the loader of its programs


def command(folder: Path) -> list[str | Path]:
    """The command that runs the `nginx.conf` of a folder."""
    [loader] = NGINX.glob("usr/lib/*/ld-linux-*.so.*")
    program = [loader, "--library-path", loader.parent, NGINX / "usr" / "sbin" / "nginx"]
    return [*program, "-p", folder, "-c", folder / "nginx.conf", "-e", "stderr", "-g", "daemon off;"]


class Front:
    """nginx before a site. It also accepts TLS and QUIC, with a certificate of its own: `certificate`."""

    def __init__(self, site, folder: Path, patience: str = "40s", address: str = "127.0.0.1"):
        """`patience` is how long nginx waits for the API's answer. Then it answers by itself."""
        self.site, self.port, self.tls_port = site, free_port(), free_port()
        self.url, self.token = f"http://{address}:{self.port}", site.token
        conf = (DEPLOY / "nginx.conf").read_text()
        for deployed, tested in {
            "server api:8000 resolve;": f"server 127.0.0.1:{site.port};",
            "listen 8080;": f"listen {address}:{self.port};",
            "proxy_read_timeout 40s;": f"proxy_read_timeout {patience};",
        }.items():
            assert conf.count(deployed) == 1
            conf = conf.replace(deployed, tested)
        (folder / "nginx.conf").write_text(conf.replace("/tmp/", f"{folder}/"))
        (folder / "tls").mkdir()
        tls = (DEPLOY / "tls" / "tls.conf.example").read_text()
        assert tls.count("listen 8443 ") == 2
        tls = tls.replace("listen 8443 ", f"listen {address}:{self.tls_port} ")
        (folder / "tls" / "tls.conf").write_text(tls)
        self.certificate = folder / "tls" / "chain.pem"
        key = ["-newkey", "rsa:2048", "-nodes", "-keyout", folder / "tls" / "key.pem"]
        name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        made = ["openssl", "req", "-x509", *key, *name, "-days", "2", "-out", self.certificate]
        subprocess.run(made, check=True, capture_output=True)
        self.process = subprocess.Popen(command(folder))
        until(lambda: exchange(self.port, head("GET", "/healthz")).status in (200, 504), what="nginx")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(10)
