"""The parts of secure aggregation: keys between two sites, sealed messages, shares of a secret, mask streams.

Key agreement, key derivation, encryption and the streams are those of the `cryptography` package. It does not share
secrets, and PyCryptodome shares secrets of 128 bits only, so that is done here in Python integers. Their arithmetic
does not take constant time; only the site that makes the shares and the server that receives them handle them.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedlab.core.errors import PrivacyError

__all__ = ["KEY_BYTES", "SHARE_BYTES", "Words", "add_streams", "commitment", "derive_key", "join_secret", "new_key",
           "pair_key", "public_key", "seal", "split_secret", "stream", "unseal"]

#: An array of uint32 or uint64, added modulo 2 to the power of its bits.
Words = np.ndarray[tuple[int], np.dtype[np.unsignedinteger]]

KEY_BYTES = 32
#: Shares are numbers modulo the Mersenne prime 2**521 - 1, above any 256-bit secret.
_PRIME = 2**521 - 1
SHARE_BYTES = 66
_NONCE_BYTES = 12
#: Words added at a time: a block of the sum and a block of a stream fit the processor's cache.
_BLOCK = 2**15


def new_key() -> bytes:
    """A private X25519 key, 32 bytes from the operating system."""
    return X25519PrivateKey.generate().private_bytes_raw()


def public_key(private: bytes) -> bytes:
    """The public key of a private one, 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def pair_key(private: bytes, public: bytes, *, purpose: str, context: bytes) -> bytes:
    """The key that two sites share: X25519 and HKDF with SHA-256; the same from either side.

    Keys of different purposes are independent, and both sites must agree on the context for their keys to be equal.

    Raises:
        PrivacyError: the public key is invalid.
    """
    try:
        agreed = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PrivacyError(f"a peer's public key is not an X25519 key ({error})") from error
    return derive_key(agreed, purpose=purpose, context=context)


def derive_key(secret: bytes, *, purpose: str, context: bytes = b"") -> bytes:
    """A 256-bit key for one purpose from a secret (HKDF, RFC 5869)."""
    info = b"fedlab secure aggregation 1|" + purpose.encode() + b"|" + context
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(secret)


def commitment(secret: bytes) -> bytes:
    """32 bytes that identify a random 256-bit secret without revealing it."""
    return hashlib.sha256(b"fedlab secure aggregation 1|commitment|" + secret).digest()


def seal(key: bytes, message: bytes, *, about: bytes) -> bytes:
    """The message encrypted and authenticated together with what it is about (ChaCha20-Poly1305, RFC 8439)."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, message, about)


def unseal(key: bytes, sealed: bytes, *, about: bytes) -> bytes:
    """The message that was sealed.

    Raises:
        PrivacyError: it was changed on its way, or is about something else.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        raise PrivacyError("a sealed message was changed on its way or is about another round") from error


def split_secret(secret: bytes, *, threshold: int, count: int) -> list[bytes]:
    """Shares of up to 64 bytes, of which any `threshold` recover them and fewer reveal nothing (Shamir 1979).

    Share k is the value at k + 1 of a random polynomial of degree `threshold` - 1.
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(_PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, count + 1):
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % _PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


def join_secret(shares: Mapping[int, bytes], *, size: int = KEY_BYTES) -> bytes:
    """The secret of `size` bytes from as many shares as its threshold, by number, by Lagrange interpolation at 0.

    Raises:
        PrivacyError: a share is invalid, or the result is not a secret of this size.
    """
    points = {index + 1: int.from_bytes(share, "big") for index, share in shares.items()}
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(y >= _PRIME for y in points.values()):
        raise PrivacyError(f"invalid share of a secret: expected {SHARE_BYTES} bytes with a number below 2**521 - 1")
    secret = 0
    for x, y in points.items():
        above = below = 1
        for other in points:
            if other != x:
                above = above * other % _PRIME
                below = below * (other - x) % _PRIME
        secret += y * above * pow(below, -1, _PRIME)
    try:
        return (secret % _PRIME).to_bytes(size, "big")
    except OverflowError as error:
        raise PrivacyError("the shares of a secret do not belong together; at least one was changed") from error


def stream(key: bytes, *, start: int = 0) -> CipherContext:
    """The ChaCha20 key stream of a key from byte `start` on, a multiple of 64. A key is used for one stream only."""
    nonce = (start // 64).to_bytes(8, "little") + bytes(8)
    return Cipher(algorithms.ChaCha20(key, nonce), mode=None).encryptor()


def add_streams(total: Words, keys: Sequence[tuple[bytes, int]]) -> None:
    """Adds the stream of each key with its sign (1 or -1) in place, modulo the word size, on as many threads as torch.
    """
    threads = max(1, torch.get_num_threads())
    length = -(-len(total) // (threads * _BLOCK)) * _BLOCK  # whole blocks begin at multiples of 64 bytes
    parts = [(total[start:start + length], start * total.itemsize) for start in range(0, len(total), max(1, length))]
    with ThreadPoolExecutor(threads) as pool:  # the cipher and numpy let other threads run meanwhile
        list(pool.map(lambda part: _add_part(part[0], part[1], keys), parts))


def _add_part(part: Words, start: int, keys: Sequence[tuple[bytes, int]]) -> None:
    streams = [(stream(key, start=start), np.add if sign > 0 else np.subtract) for key, sign in keys]
    zeros = bytes(_BLOCK * part.itemsize)
    buffer = np.empty(len(zeros), np.uint8)
    for at in range(0, len(part), _BLOCK):
        block = part[at:at + _BLOCK]
        size = block.nbytes
        for cipher, change in streams:
            cipher.update_into(memoryview(zeros)[:size], buffer.data)
            mask = buffer[:size].view(part.dtype.newbyteorder("<"))
            change(block, mask, out=block)
