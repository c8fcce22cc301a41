"""Who a centre is, and what may be pinned."""

from __future__ import annotations

import datetime
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from controlplane.certificates import (
    CentreIdentity,
    InvalidCertificateError,
    certificate_of_key,
    key_from_secret,
    name_of,
    name_of_invitation,
    new_secret,
    pem_of,
    public_key_of,
    require_pinnable,
    sign,
    verify,
)

HERE, THERE = "a" * 32, "b" * 32


def made(
    name: str = name_of(HERE),
    *,
    subject: str = "",
    ca: bool = False,
    signs_others: bool = False,
    key: ec.EllipticCurvePrivateKey | None = None,
    signer: ec.EllipticCurvePrivateKey | None = None,
    days: tuple[int, int] = (-1, 1),
) -> bytes:
    """Returns a certificate as somebody else might make it."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    whose = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or name)])
    at = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(whose)
        .issuer_name(whose)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at + datetime.timedelta(days=days[0]))
        .not_valid_after(at + datetime.timedelta(days=days[1]))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=True,
                key_cert_sign=signs_others,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                crl_sign=False,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(serialization.Encoding.DER)


def test_an_identity_is_made_once_and_kept_for_nobody_else_to_read(tmp_path: Path) -> None:
    folder = tmp_path / "federation"
    first = CentreIdentity.open(folder, HERE)
    assert CentreIdentity.open(folder, HERE) == first
    [file] = folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    require_pinnable(first.certificate, HERE)
    certificate = x509.load_der_x509_certificate(first.certificate)
    assert (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days > 19 * 365
    assert pem_of(first.certificate) == first.certificate_pem
    assert CentreIdentity.open(tmp_path / "other", HERE).fingerprint != first.fingerprint


def test_what_a_crash_left_half_written_is_not_taken_for_an_identity(tmp_path: Path) -> None:
    (tmp_path / "identity.new").write_text("-----BEGIN PRIV")
    (tmp_path / "identity.new").chmod(0o600)
    made = CentreIdentity.open(tmp_path, HERE)
    assert [file.name for file in tmp_path.iterdir()] == ["identity.pem"]
    assert CentreIdentity.open(tmp_path, HERE) == made


def test_an_identity_that_is_damaged_or_another_centres_is_said_to_be(tmp_path: Path) -> None:
    one = CentreIdentity.open(tmp_path / "one", HERE)
    other = CentreIdentity.open(tmp_path / "other", THERE)
    path = tmp_path / "one/identity.pem"
    with pytest.raises(ValueError, match="pair with every peer again"):
        CentreIdentity.open(tmp_path / "one", THERE)
    path.write_bytes(one.key_pem + other.certificate_pem)
    with pytest.raises(ValueError, match="do not belong together"):
        CentreIdentity.open(tmp_path / "one", HERE)
    for damaged in (b"", one.key_pem, one.key_pem[:90] + one.certificate_pem, b"\xff\x00"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged; restore it"):
            CentreIdentity.open(tmp_path / "one", HERE)


def test_a_secret_stands_for_a_key_that_signs() -> None:
    secret = new_secret()
    key = key_from_secret(secret)
    public_key = public_key_of(certificate_of_key(key, name_of_invitation(key)))
    signature = sign(secret, b"what is said")
    assert verify(public_key, signature, b"what is said")
    assert not verify(public_key, signature, b"what is not said")
    assert not verify(public_key, signature[:-1], b"what is said")
    assert not verify(public_key_of(made()), signature, b"what is said")
    assert not verify("no key", signature, b"what is said")
    for wrong in (b"", b"\0" * 32, secret + b"\0", b"\xff" * 32):
        with pytest.raises(ValueError):  # noqa: PT011 - cryptography's own words
            key_from_secret(wrong)


def test_only_what_a_centre_makes_for_itself_may_be_pinned() -> None:
    require_pinnable(made(), HERE)
    small = ec.generate_private_key(ec.SECP384R1())
    key, stranger = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    wrong = {
        "cannot be read": b"no certificate",
        "larger than": b"\0" * 9000,
        "curve P-256": made(key=small),
        "signed with its own key": made(key=key, signer=stranger),
        "could sign others": made(ca=True),
        f"not that of {name_of(HERE)}": made(name_of(THERE)),
        "no longer, or not yet": made(days=(-2, -1)),
    }
    for why, certificate in wrong.items():
        with pytest.raises(InvalidCertificateError, match=why):
            require_pinnable(certificate, HERE)
    with pytest.raises(InvalidCertificateError, match="could sign others"):
        require_pinnable(made(signs_others=True), HERE)
    # The name by which TLS looks for whom it trusts is the subject's.
    with pytest.raises(InvalidCertificateError, match="not that of"):
        require_pinnable(made(subject=name_of(THERE)), HERE)
    with pytest.raises(InvalidCertificateError, match="no longer, or not yet"):
        require_pinnable(made(days=(1, 2)), HERE)
