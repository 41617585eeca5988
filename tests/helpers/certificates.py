"""Certificates that a test's own authority signs, as files."""

from __future__ import annotations

from pathlib import Path

import trustme


def issue(authority: trustme.CA, name: str, folder: Path) -> tuple[str, str]:
    """Write a certificate for a host or a mail address into a folder.

    Returns:
      the path of the certificate with its chain, and the path of its key.
    """
    issued = authority.issue_cert(name)
    cert, key = str(folder / f"{name}.pem"), str(folder / f"{name}.key")
    issued.private_key_pem.write_to_path(key)
    for number, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(cert, append=number > 0)
    return cert, key


class Certificates:
    """The files of a server's and a client's certificates, and of those that sign them."""

    def __init__(self, folder: Path, authority: trustme.CA, server_name: str) -> None:
        self.ca = str(folder / "ca.pem")
        self.other_ca = str(folder / "other-ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        trustme.CA().cert_pem.write_to_path(self.other_ca)
        cert, key = issue(authority, server_name, folder)
        self._files = f'cert_file: "{cert}", key_file: "{key}"'
        self.client, self.client_key = issue(authority, "agent@example.org", folder)

    def config(self, more: str = "") -> str:
        return f"tls {{ {self._files} {more} }}"

    @property
    def mutual(self) -> str:
        return self.config(f', ca_file: "{self.ca}", verify: true')
