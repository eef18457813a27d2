"""The key/value cache of one sequence: full, or rolling when the model has a sliding window."""

from typing import Any

import numpy as np

from tinymoe.config import MixtralConfig

Array = np.ndarray


class KVCache:
    """The rotated keys and the values of the positions that a sequence's next token may still see.

    With a sliding window W no token sees further back than W positions, so position p lives at p mod W and the
    newest overwrites what nobody will read again (section 2 of Mistral 7B, arXiv 2310.06825): memory stays bounded
    however long the text. Keys carry their absolute position in their rotation, so their order in the buffer does
    not matter to the softmax.

    Parameters
    ----------
    config
        Of the model.
    capacity
        The longest sequence, in tokens; a window shorter than this bounds the buffer.
    dtype
        Of keys and values.
    empty
        Makes their arrays: ``numpy.empty``, or a device's.

    Attributes
    ----------
    length
        Tokens seen so far, which is also the position of the next.
    step, row
        The recorded step of decoding of which this cache is a row, and which; None without one.
    """

    def __init__(self, config: MixtralConfig, capacity: int, dtype: Any = "float32", empty: Any = np.empty):
        self.capacity = capacity
        self.slots = min(capacity, config.sliding_window or capacity)
        shape = (1, self.slots, config.n_kv_heads, config.head_dim)  # (1, slots, G, K) of each layer
        self.keys = [empty(shape, dtype) for _ in range(config.n_layers)]
        self.values = [empty(shape, dtype) for _ in range(config.n_layers)]
        self.length = 0
        self.step: Any = None
        self.row: int | None = None

    def update(self, layer: int, k: Array, v: Array) -> tuple[Array, Array]:
        """Store the next T positions of a layer and return all keys and values that they may see.

        Call it for every layer, then `advance` once.

        Parameters
        ----------
        k, v
            (1, T, G, K).

        Returns
        -------
        keys, values
            (1, S, G, K), the last T of them being the new ones; a single new one may stand anywhere, since one
            query sees all that is returned.
        """
        new, start = k.shape[1], self.length
        self.check_room(new)
        keys, values = self.keys[layer], self.values[layer]
        if new == 1:
            keys[:, start % self.slots] = k[:, 0]
            values[:, start % self.slots] = v[:, 0]
            seen = min(start + 1, self.slots)
            return keys[:, :seen], values[:, :seen]
        past = np.arange(max(0, start - self.slots), start) % self.slots  # oldest first
        seen_k = np.concatenate([keys[:, past], k], axis=1)
        seen_v = np.concatenate([values[:, past], v], axis=1)
        kept = np.arange(max(start, start + new - self.slots), start + new)
        keys[:, kept % self.slots] = k[:, kept - start]
        values[:, kept % self.slots] = v[:, kept - start]
        return seen_k, seen_v

    def check_room(self, new: int) -> None:
        """Raise ValueError if ``new`` more positions exceed the capacity."""
        if self.length + new > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {self.length + new} were asked for")

    def advance(self, new: int) -> None:
        """Count ``new`` positions that every layer has stored."""
        self.length += new
