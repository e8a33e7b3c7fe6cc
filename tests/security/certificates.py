"""Certificate authorities and certificates of a test's own, made by openssl."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate and its private key, which only its owner may read."""

    certificate: Path
    key: Path


def authority(folder: Path, name: str) -> Pair:
    """A self-signed CA called ``name``."""
    pair = _paths(folder, name)
    _openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", f"/CN={name}", "-keyout", str(pair.key), "-out", str(pair.certificate))  # fmt: skip
    return _private(pair)


def signed(folder: Path, name: str, ca: Pair, *, alternative: str = "") -> Pair:
    """A certificate for ``name`` by ``ca``; ``alternative`` is such as ``IP:127.0.0.1``."""
    pair = _paths(folder, name)
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    extensions.write_text(f"subjectAltName={alternative or 'DNS:' + name}\n")
    _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
             "-keyout", str(pair.key), "-out", str(request))  # fmt: skip
    _openssl("x509", "-req", "-days", "2", "-in", str(request), "-CA", str(ca.certificate), "-CAkey", str(ca.key),
             "-CAcreateserial", "-extfile", str(extensions), "-out", str(pair.certificate))  # fmt: skip
    return _private(pair)


def _paths(folder: Path, name: str) -> Pair:
    return Pair(folder / f"{name}.crt", folder / f"{name}.key")


def _private(pair: Pair) -> Pair:
    pair.key.chmod(0o600)
    return pair


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)
