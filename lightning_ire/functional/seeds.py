"""Seeds for draws that have to be the same on all ranks, or unrelated on each."""

import hashlib

__all__ = ["mixed_seed"]


def mixed_seed(*parts: object) -> int:
    """A 62-bit seed from any parts: neighbouring steps or ranks give unrelated streams, the same on every machine.

    Args:
        *parts: Integers and strings.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
