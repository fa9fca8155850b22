"""Which sample comes when: sample = f(seed, epoch, index), never of rank, worker or library version.

An epoch's order is a permutation that is computed, not stored: a Feistel network over the index with BLAKE2b as its
round function, walked until it falls inside the data set (M. Luby, C. Rackoff, 1988; J. Black, P. Rogaway, 2002, "cycle
walking"). Any position of any epoch is found in constant time and memory, by every rank for itself.
"""

from __future__ import annotations

import hashlib

_ROUNDS = 6


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from a tuple; equal tuples give equal seeds on any machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


class SampleOrder:
    """The order of samples of a run: position 0, 1, 2... counts on through all epochs.

    Args:
        seed: the run's.
        num_samples: length of the data set.
        shuffle: False: in the order of the data set.
    """

    def __init__(self, seed: int, num_samples: int, shuffle: bool = True) -> None:
        assert num_samples > 0
        self.num_samples = num_samples
        self._seed = seed
        self._shuffle = shuffle
        self._half_bits = max(1, (max(1, num_samples - 1).bit_length() + 1) // 2)

    def address(self, position: int) -> tuple[int, int]:
        """(epoch, index) of a position."""
        epoch, index = divmod(position, self.num_samples)
        if not self._shuffle:
            return epoch, index
        key = derive_seed(self._seed, "order", epoch).to_bytes(8, "little")
        index = self._encrypt(key, index)
        while index >= self.num_samples:
            index = self._encrypt(key, index)
        return epoch, index

    def _encrypt(self, key: bytes, value: int) -> int:
        mask = (1 << self._half_bits) - 1
        left, right = value >> self._half_bits, value & mask
        for round_number in range(_ROUNDS):
            digest = hashlib.blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([round_number]))
            left, right = right, left ^ (int.from_bytes(digest.digest(), "little") & mask)
        return left << self._half_bits | right
