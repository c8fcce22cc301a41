"""Mutual TLS between two that have pinned each other's certificate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc

__all__ = ["MutualTls", "Pinned"]


@dataclass(frozen=True)
class MutualTls:
    """Who a server is, and whom it lets in."""

    key: bytes
    """PEM."""
    certificate: bytes
    """PEM."""
    pins: Callable[[], Sequence[bytes]]
    """Returns the certificates (PEM) of those who may come in now. Asked at every handshake, from any thread."""

    most_connections: int = 512
    """So many connections may be open at once, of all together. Those that are too many are closed, so that they use
    up nothing that the rest of the program needs."""

    def credentials(self) -> grpc.ServerCredentials:
        """Returns them for a gRPC server. Who is not pinned does not get past the handshake."""
        before = self._roots()

        def renewed() -> grpc.ServerCertificateConfiguration | None:
            # To read 200 certificates takes longer than a handshake; None is "as before".
            nonlocal before
            roots = self._roots()
            if roots == before:
                return None
            before = roots
            return self._configuration(roots)

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(before),
            renewed,  # type: ignore[arg-type]  # gRPC's documentation allows None, its stubs do not
            require_client_authentication=True,
        )

    def _roots(self) -> bytes:
        # Nobody is let in where nobody is pinned: an empty list of roots would be the system's own.
        return b"".join(self.pins()) or self.certificate

    def _configuration(self, roots: bytes) -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(self.key, self.certificate)], roots)


@dataclass(frozen=True)
class Pinned:
    """Who a client is, and whom alone it talks to."""

    key: bytes
    """PEM."""
    certificate: bytes
    """PEM."""
    server_certificate: bytes
    """PEM."""
    server_name: str
    """DNS name in the server's certificate."""

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns them for a gRPC channel."""
        return grpc.ssl_channel_credentials(self.server_certificate, self.key, self.certificate)
