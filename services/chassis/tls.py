"""Mutual TLS between the services: one certificate, its key and the authority that all trust, as credentials of gRPC.

Nothing here listens, connects or knows who may call: a certificate says which machine is there, the passport says for whom it asks.
"""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import grpc


@dataclass(frozen=True)
class MutualTls:
    """What a service shows, and whom it believes, all as PEM."""

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    @classmethod
    def read(cls, certificate: Path, key: Path, authority: Path) -> Self:
        """Read the three files, once: a new certificate needs a restart. Raises ValueError that names the file that does not serve."""
        contents = []
        for path in (certificate, key, authority):
            try:
                contents.append(path.read_bytes())
            except OSError as error:
                raise ValueError(f"{path}: {error.strerror}") from None
        check_pair(certificate, key)
        try:
            ssl.create_default_context(cafile=str(authority))
        except ssl.SSLError:
            raise ValueError(f"{authority}: no certificate of an authority in PEM") from None
        return cls(*contents)

    def server_credentials(self, *, verify_clients: bool) -> grpc.ServerCredentials:
        """For a server. With `verify_clients` nobody connects without a certificate of the authority."""
        return grpc.ssl_server_credentials(
            [(self.key, self.certificate)], root_certificates=self.authority, require_client_auth=verify_clients
        )

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a channel: only a server with a certificate of the authority, for the name that is dialled, is spoken to."""
        return grpc.ssl_channel_credentials(root_certificates=self.authority, private_key=self.key, certificate_chain=self.certificate)


def check_pair(certificate: Path, key: Path) -> None:
    """Raise ValueError unless both files can be read as PEM and belong together. An encrypted key is refused: nobody is there to ask."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, password="")
    except OSError as error:
        raise ValueError(f"{certificate} and {key} are not a certificate and its key in PEM: {error.strerror or error}") from None
