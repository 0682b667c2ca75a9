"""Our key for webhooks: signs what we deliver, shows its public half, and makes the tokens of our own webhook URLs.

What signs the dashboard's sessions is derived from it too, so that there is one secret to keep.

Sole user of `cryptography`. The private key comes from a setting or from a file beside the database that is made at
the first start; it is never in the database, a log or an error.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from abhiapi.errors import SettingsError
from abhiapi.setting_forms import webhook_secret

SECRET_BYTES = 32


class WebhookKey:
    """One ED25519 key. Shows nothing of itself."""

    __slots__ = ("_private", "_token_key", "public", "session_secret")

    def __init__(self, secret: bytes) -> None:
        self._private = Ed25519PrivateKey.from_private_bytes(secret)
        self.public: bytes = self._private.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        self._token_key = hmac.digest(secret, b"abhiapi webhook tokens", "sha256")
        self.session_secret: bytes = HKDF(SHA256(), SECRET_BYTES, salt=None, info=b"abhiapi sessions").derive(secret)

    @classmethod
    def new(cls) -> WebhookKey:
        return cls(os.urandom(SECRET_BYTES))

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)

    def token(self, subject: str) -> str:
        """What only we can have put into a URL about this subject."""
        return hmac.digest(self._token_key, subject.encode(), "sha256").hex()

    def is_token(self, subject: str, token: str) -> bool:
        return hmac.compare_digest(self.token(subject).encode(), token.encode("utf-8", "replace"))

    def jwks(self) -> dict[str, Any]:
        """The public half as a JSON Web Key Set (RFC 8037); the id is the key's thumbprint, shortened."""
        kid = hashlib.sha256(self.public).hexdigest()[:16]
        x = base64.urlsafe_b64encode(self.public).rstrip(b"=").decode()
        return {"keys": [{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x}]}


def public_keys(jwks: object) -> list[bytes]:
    """The ED25519 keys of a JSON Web Key Set; what is none is left out."""
    found = []
    keys = jwks.get("keys") if isinstance(jwks, Mapping) else None
    for key in keys if isinstance(keys, list) else []:
        x = key.get("x") if isinstance(key, Mapping) else None
        try:
            raw = base64.urlsafe_b64decode(x + "=" * (-len(x) % 4)) if isinstance(x, str) else b""
        except (binascii.Error, ValueError):
            continue
        if len(raw) == SECRET_BYTES:
            found.append(raw)
    return found


def is_signed_by(public: bytes, signature: bytes, message: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def load(secret: bytes | None, file: Path) -> WebhookKey:
    """The key of the settings, else that of the file, which is made if there is none. Raises `SettingsError`."""
    if secret is not None:
        return WebhookKey(secret)
    try:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            _make(file)
        return WebhookKey(webhook_secret(file.read_text("ascii")))
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "it holds no key"
        raise SettingsError(
            [f"the webhook key {file} cannot be used ({why}): mend it, or set ABHIAPI_WEBHOOK_KEY"]
        ) from error


def _make(file: Path) -> None:
    """A new key, whole or not at all: of several processes that start at once, one's file stays."""
    made = file.with_name(f"{file.name}.{os.getpid()}.{os.urandom(4).hex()}")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
        out.write(base64.b64encode(os.urandom(SECRET_BYTES)) + b"\n")
        out.flush()
        os.fsync(out.fileno())
    try:
        os.link(made, file)
    except FileExistsError:
        pass  # another process was faster
    finally:
        made.unlink()
