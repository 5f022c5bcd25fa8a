"""Certificates by openssl, and kubeconfig files that carry all they need in themselves."""

from __future__ import annotations

import base64
import json
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VALID_DAYS = 30
KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
ANY_KEY_IDENTIFIER = ("-addext", "subjectKeyIdentifier=hash")


@dataclass(frozen=True)
class KeyPair:
    certificate: Path
    key: Path


@dataclass(frozen=True)
class Authority:
    """The certificate authority. A client certificate's common name is a user, its organisations are groups."""

    folder: Path

    @property
    def certificate(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def key(self) -> Path:
        return self.folder / "ca.key"

    @classmethod
    def create(cls, folder: Path) -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder)
        # Debian's own configuration would make every certificate one of an authority.
        (folder / "openssl.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
        authority._request(
            authority.certificate,
            authority.key,
            *("-subj", "/CN=test-cluster", *ANY_KEY_IDENTIFIER),
            *("-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign,cRLSign"),
        )
        return authority

    def issue(self, user: str, groups: Sequence[str] = (), hosts: Sequence[str] = ()) -> KeyPair:
        """Key and certificate for a client, and with ``hosts`` (names or IPv4 addresses) for a server too."""
        file = user.replace("/", "_").replace(":", "-")
        pair = KeyPair(self.folder / f"{file}.crt", self.folder / f"{file}.key")
        subject = "".join(f"/{kind}={_escaped(name)}" for kind, name in (*(("O", g) for g in groups), ("CN", user)))
        names = [f"{'IP' if h.replace('.', '').isdigit() else 'DNS'}:{h}" for h in hosts]
        self._request(
            pair.certificate,
            pair.key,
            *("-CA", self.certificate, "-CAkey", self.key, "-subj", subject, *ANY_KEY_IDENTIFIER),
            *("-addext", "authorityKeyIdentifier=keyid", "-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "extendedKeyUsage=clientAuth,serverAuth" if hosts else "extendedKeyUsage=clientAuth"),
            *(("-addext", f"subjectAltName={','.join(names)}") if names else ()),
        )
        return pair

    def signing_key(self, name: str) -> Path:
        """A bare private key, for service-account tokens."""
        path = self.folder / f"{name}.key"
        _openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path)  # in the form both uses can read
        return path

    def _request(self, certificate: Path, key: Path, *more: str | Path) -> None:
        config = self.folder / "openssl.cnf"
        _openssl(
            *("req", "-x509", *KEY, "-config", config, "-days", str(VALID_DAYS)),
            *("-out", certificate, "-keyout", key, *more),
        )


def write_kubeconfig(
    path: Path, url: str, authority: Authority, *, token: str = "", client: KeyPair | None = None, namespace: str = ""
) -> Path:
    """Write a kubeconfig for a token or a client certificate. It is JSON, which is YAML."""
    user = {"token": token} if token else {}
    if client:
        user = {"client-certificate-data": _encoded(client.certificate), "client-key-data": _encoded(client.key)}
    cluster = {"server": url, "certificate-authority-data": _encoded(authority.certificate)}
    context = {"cluster": "test", "user": "user", **({"namespace": namespace} if namespace else {})}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "test", "cluster": cluster}],
        "users": [{"name": "user", "user": user}],
        "contexts": [{"name": "test", "context": context}],
        "current-context": "test",
    }
    path.touch(mode=0o600)
    path.write_text(json.dumps(config, indent=1))
    return path


def _encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def _escaped(name: str) -> str:
    return name.replace("\\", "\\\\").replace("/", "\\/").replace("+", "\\+")


def _openssl(*arguments: str | Path) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"openssl {arguments[0]}: {done.stderr}")
