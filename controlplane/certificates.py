"""Who this centre is to its peers: one key, and one certificate that it has signed itself (decision 0013)."""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = [
    "CentreIdentity",
    "InvalidCertificateError",
    "certificate_of_key",
    "fingerprint",
    "key_from_secret",
    "name_of",
    "name_of_invitation",
    "new_secret",
    "pem_of",
    "public_key_of",
    "require_pinnable",
    "require_self_signed",
    "sign",
    "verify",
]

_VALID = datetime.timedelta(days=20 * 365)
_SKEW = datetime.timedelta(days=2)
_CURVE = ec.SECP256R1()
_MOST_BYTES = 8192
_SIGNS_HANDSHAKES = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
_UNREADABLE = (
    ValueError,
    TypeError,
    UnsupportedAlgorithm,
    x509.InvalidVersion,
    x509.ExtensionNotFound,
    x509.DuplicateExtension,
    x509.UnsupportedGeneralNameType,
)


class InvalidCertificateError(ValueError):
    """Bytes that are no certificate which a centre could have; the text is a sentence."""


@dataclass(frozen=True)
class CentreIdentity:
    """A key and the certificate that belongs to it."""

    key_pem: bytes
    certificate: bytes
    """DER."""

    @property
    def certificate_pem(self) -> bytes:
        """The certificate as TLS libraries read it."""
        return pem_of(self.certificate)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the certificate, in hexadecimal."""
        return fingerprint(self.certificate)

    @classmethod
    def open(cls, folder: Path, centre_id: str) -> CentreIdentity:
        """Returns the identity in a folder; makes it the first time.

        Args:
            folder: made if it is not there.
            centre_id: `Store.centre_id`.

        Raises:
            OSError: it cannot be read or made.
            ValueError: what is there is no key, no certificate, or those of another centre.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / "identity.pem"
        if not path.exists():
            # Key and certificate in one file: there is never one without the other.
            made = cls.of_key(ec.generate_private_key(_CURVE), centre_id)
            _write(path, made.key_pem + made.certificate_pem)
        text = path.read_bytes()
        try:
            key = serialization.load_pem_private_key(text, None)
            certificate = x509.load_pem_x509_certificate(text)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged; restore it from a backup ({error})") from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or certificate.public_key() != key.public_key():
            raise ValueError(f"{path}: its key and its certificate do not belong together; restore it from a backup")
        found = cls(_key_pem(key), certificate.public_bytes(serialization.Encoding.DER))
        try:
            require_pinnable(found.certificate, centre_id)
        except InvalidCertificateError as error:
            raise ValueError(
                f"{path} cannot stand for this centre, {centre_id}: {error}; restore the one that belongs to this "
                "store, or move it away and pair with every peer again"
            ) from error
        return found

    @classmethod
    def of_key(cls, key: ec.EllipticCurvePrivateKey, centre_id: str) -> CentreIdentity:
        """Returns the identity of a key."""
        return cls(_key_pem(key), certificate_of_key(key, name_of(centre_id)))

    @classmethod
    def of_secret(cls, secret: bytes, certificate: bytes) -> CentreIdentity:
        """Returns the identity of a key that a number stands for, with its certificate (DER).

        Raises:
            ValueError: the number stands for none.
        """
        return cls(_key_pem(key_from_secret(secret)), certificate)


def name_of(centre_id: str) -> str:
    """Returns the DNS name in a centre's certificate."""
    return f"{centre_id}.puhui"


def name_of_invitation(key: ec.EllipticCurvePrivateKey) -> str:
    """Returns the DNS name in the certificate of an invitation's key.

    No two have the same: TLS looks by name for who is let in, and of several with one name it tries the first alone.
    """
    point = key.public_key().public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    return f"{hashlib.sha256(point).hexdigest()[:32]}.invited.puhui"


def certificate_of_key(key: ec.EllipticCurvePrivateKey, name: str) -> bytes:
    """Returns a certificate for a key, signed with it: DER."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    at = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - _SKEW)
        .not_valid_after(at + _VALID)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        # It signs no others: a peer cannot let anybody else in. Of what is pinned, TLS looks at the key's usage alone.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_SIGNS_HANDSHAKES, critical=True)
        .sign(key, hashes.SHA256())
    )
    return made.public_bytes(serialization.Encoding.DER)


def new_secret() -> bytes:
    """Returns a new private key as a number of 32 bytes."""
    key = ec.generate_private_key(_CURVE)
    return key.private_numbers().private_value.to_bytes(32, "big")


def key_from_secret(secret: bytes) -> ec.EllipticCurvePrivateKey:
    """Returns the key that a number stands for.

    Raises:
        ValueError: it stands for none.
    """
    if len(secret) != 32:
        raise ValueError("a key is a number of 32 bytes")
    return ec.derive_private_key(int.from_bytes(secret, "big"), _CURVE)


def public_key_of(certificate: bytes) -> str:
    """Returns the public key in a certificate (DER): its uncompressed point, in hexadecimal.

    Raises:
        InvalidCertificateError: it is no certificate of a centre.
    """
    with _readable():
        key = _load(certificate).public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE.name:
        raise InvalidCertificateError("the certificate's key is not on the curve P-256")
    point = key.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.UncompressedPoint)
    return point.hex()


def require_pinnable(certificate: bytes, centre_id: str) -> None:
    """Refuses a certificate that a centre could not be known by, or that others could get in with.

    TLS looks for whom it trusts by the name in a certificate. Two pinned ones with one name would hide each other, so
    each centre's has the name of its own id.

    Args:
        certificate: DER.
        centre_id: id of the centre that says it is its own.

    Raises:
        InvalidCertificateError: it is none that `certificate_of_key` would make for that centre.
    """
    public_key_of(certificate)
    found, name = _load(certificate), name_of(centre_id)
    wanted = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    with _readable():
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        is_ca = found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = found.extensions.get_extension_for_class(x509.KeyUsage).value
        is_named_so = found.subject == wanted and names.get_values_for_type(x509.DNSName) == [name]
    require_self_signed(certificate)
    if is_ca or usage != _SIGNS_HANDSHAKES:
        raise InvalidCertificateError("the certificate could sign others, with which anybody might come")
    if not is_named_so:
        raise InvalidCertificateError(f"the certificate is not that of {name}")
    at = datetime.datetime.now(datetime.UTC)
    if not found.not_valid_before_utc <= at < found.not_valid_after_utc:
        raise InvalidCertificateError("the certificate holds no longer, or not yet; compare the clocks of both centres")


def require_self_signed(certificate: bytes) -> None:
    """Refuses a certificate (DER) that was changed after its own key had signed it, or was signed with another.

    Raises:
        InvalidCertificateError: it is one of these.
    """
    with _readable():
        found = _load(certificate)
        try:
            found.verify_directly_issued_by(found)
        except InvalidSignature as error:
            raise InvalidCertificateError("the certificate is not signed with its own key") from error


@functools.lru_cache(maxsize=1024)
def pem_of(certificate: bytes) -> bytes:
    """Returns a certificate (DER) as PEM.

    Raises:
        InvalidCertificateError: it is none.
    """
    return _load(certificate).public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: bytes) -> str:
    """Returns the SHA-256 of a certificate (DER), in hexadecimal."""
    return hashlib.sha256(certificate).hexdigest()


def sign(secret: bytes, data: bytes) -> bytes:
    """Returns the signature of some bytes with the key that a number stands for."""
    return key_from_secret(secret).sign(data, ec.ECDSA(hashes.SHA256()))


def verify(public_key: str, signature: bytes, data: bytes) -> bool:
    """Returns whether a signature was made with the key of which this is the public one."""
    try:
        point = ec.EllipticCurvePublicKey.from_encoded_point(_CURVE, bytes.fromhex(public_key))
        point.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature):
        return False
    return True


def _load(certificate: bytes) -> x509.Certificate:
    if len(certificate) > _MOST_BYTES:
        raise InvalidCertificateError("the certificate is larger than any certificate of a centre")
    with _readable():
        return x509.load_der_x509_certificate(certificate)


@contextlib.contextmanager
def _readable() -> Iterator[None]:
    """Says in one way what cryptography says in many: parts of a certificate are read when they are asked for."""
    try:
        yield
    except InvalidCertificateError:
        raise
    except _UNREADABLE as error:
        raise InvalidCertificateError(f"the certificate cannot be read ({error})") from error


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".new")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    # Peers pin what is made here: it must not be gone after a power cut.
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
