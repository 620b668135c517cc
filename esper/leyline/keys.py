"""Keyed randomness: every draw comes from a generator that its key determines, never from a shared stream.

Source: counter-based generators, Salmon et al. 2011 (Philox); keys are BLAKE2b digests of canonical JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import numpy as np

KeyPart = str | int | float | bool | None | Sequence["KeyPart"]


def canonical_json(value: object) -> str:
    """Return the one JSON spelling of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def hex_digest(value: object, length: int = 64) -> str:
    """Return the first `length` hex digits of the SHA-256 of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def derive_seed(*parts: KeyPart) -> int:
    """Return a seed in [0, 2**63) that depends on the parts and on nothing else."""
    digest = hashlib.blake2b(canonical_json(list(parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def numpy_generator(*parts: KeyPart) -> np.random.Generator:
    """Return a NumPy generator keyed by the parts."""
    digest = hashlib.blake2b(canonical_json(list(parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big")))
