"""The example of a reverse proxy: parsed by nginx itself, and started before a real dashboard."""

from __future__ import annotations

import base64
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.doubles.small_study import new_study
from tests.security.certificates import Pair, authority, signed
from tests.servers.ports import free_port
from was_storage.dashboard.app import open_dashboard
from was_storage.server.database import Database

EXAMPLE = Path(__file__).parents[2] / "deploy" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
USER, PASSWORD = "ada", "lovelace"

needs_nginx = [
    pytest.mark.skipif(NGINX is None, reason="no nginx is installed (Debian: apt-get install nginx-light)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl is installed"),
]


def test_it_encrypts_asks_for_a_login_and_lets_people_look() -> None:
    text = EXAMPLE.read_text(encoding="utf-8")
    assert text.count("{") == text.count("}")
    lines = {" ".join(line.split("#")[0].split()) for line in text.splitlines()}
    assert {"listen 443 ssl;", "limit_except GET { deny all; }", "proxy_pass http://127.0.0.1:8080;"} <= lines
    assert {'auth_basic "was-search";', "auth_basic_user_file /etc/nginx/was-search/users;"} <= lines
    assert all(line == "" or line[-1] in ";{}" for line in lines)


@pytest.fixture
def placed(tmp_path: Path) -> Callable[[int], tuple[Path, Pair, int]]:
    """Writes a configuration that includes the example, with its files and ports moved to the test's own."""

    def place(dashboard_port: int) -> tuple[Path, Pair, int]:
        ca = authority(tmp_path, "proxy-ca")
        pair = signed(tmp_path, "localhost", ca)
        made = subprocess.run(["openssl", "passwd", "-apr1", PASSWORD], check=True, capture_output=True, text=True)
        (tmp_path / "users").write_text(f"{USER}:{made.stdout}")
        port, plain = free_port(), free_port()
        example = EXAMPLE.read_text(encoding="utf-8")
        for there, here in (
            ("/etc/nginx/was-search/certificate.pem", str(pair.certificate)),
            ("/etc/nginx/was-search/key.pem", str(pair.key)),
            ("/etc/nginx/was-search/users", str(tmp_path / "users")),
            ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
            ("listen 80;", f"listen 127.0.0.1:{plain};"),
            ("http://127.0.0.1:8080", f"http://127.0.0.1:{dashboard_port}"),
        ):
            assert example.count(there) == 1, there
            example = example.replace(there, here)
        (tmp_path / "site.conf").write_text(example)
        folders = "".join(
            f"{kind}_temp_path {tmp_path / kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        as_root = "user root;\n" if os.geteuid() == 0 else ""  # pytest's folders are private
        (tmp_path / "nginx.conf").write_text(
            f"{as_root}pid {tmp_path}/pid;\nerror_log {tmp_path}/error.log;\ndaemon off;\nevents {{}}\n"
            f"http {{\naccess_log {tmp_path}/access.log;\n{folders}include {tmp_path}/site.conf;\n}}\n"
        )
        tmp_path.chmod(0o755)
        return tmp_path / "nginx.conf", ca, port

    return place


def parsed(configuration: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(NGINX), "-t", "-c", str(configuration)], capture_output=True, text=True)


class TestNginx:
    pytestmark = needs_nginx

    def test_nginx_takes_it(self, placed) -> None:
        configuration, _, _ = placed(8080)
        done = parsed(configuration)
        assert done.returncode == 0, done.stderr
        site = configuration.with_name("site.conf")
        site.write_text(site.read_text().replace("auth_basic ", "auth_basics "))  # the check checks something
        assert parsed(configuration).returncode != 0

    @pytest.fixture
    def proxied(self, database: Database, placed) -> Iterator[Callable[..., tuple[int, str]]]:
        with database.read_only() as reading, open_dashboard(reading, port=0) as server:
            thread = threading.Thread(target=server.serve_forever)
            thread.start()
            configuration, ca, port = placed(server.server_port)
            nginx = subprocess.Popen([str(NGINX), "-c", str(configuration)])
            trusted = ssl.create_default_context(cafile=str(ca.certificate))
            try:

                def ask(path: str, method: str = "GET", login: str = "") -> tuple[int, str]:
                    headers = {"Authorization": "Basic " + base64.b64encode(login.encode()).decode()} if login else {}
                    request = urllib.request.Request(f"https://localhost:{port}{path}", method=method, headers=headers)
                    try:
                        with urllib.request.urlopen(request, context=trusted, timeout=30) as answer:
                            return answer.status, answer.read().decode(errors="replace")
                    except urllib.error.HTTPError as error:
                        return error.code, error.read().decode(errors="replace")

                end = time.monotonic() + 300
                while True:
                    try:
                        ask("/")
                        break
                    except OSError:
                        assert time.monotonic() < end and nginx.poll() is None
                        time.sleep(0.1)
                yield ask
            finally:
                nginx.terminate()
                nginx.wait(120)
                server.shutdown()
                thread.join()

    @pytest.mark.postgres
    def test_a_dashboard_behind_it(self, database: Database, proxied) -> None:
        record = new_study(database)
        for login in ("", f"{USER}:wrong", "nobody:lovelace"):
            status, words = proxied("/api/studies", login=login)
            assert status == 401
            assert record.name not in words
        status, words = proxied("/api/studies", login=f"{USER}:{PASSWORD}")
        assert status == 200
        assert record.name in words
        assert re.search("<title>", proxied("/dashboard", login=f"{USER}:{PASSWORD}")[1])
        for method in ("DELETE", "POST", "PUT"):
            status, _ = proxied(f"/api/studies/{record.optuna_study_id}", method, login=f"{USER}:{PASSWORD}")
            assert status == 403
