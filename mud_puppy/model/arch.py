"""What one decoder-only transformer is: every difference between families, as data.

One legend for the letters of the whole package:

    B batch      T tokens (queries)   S cache slots or key length   D hidden_size   V vocab_size
    H heads      K kv_heads           hd head_dim                   F mlp_size      L layers

`Arch` is hashable and holds no arrays, so it is a static argument of every jitted function. It is
read from a Hugging Face config by `families.read_config`.
"""

import dataclasses
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the angle of pair d at position p is `p * inv_freq[d]`.

    cos and sin are multiplied by `scale`. Every scaling kind but one is a table of frequencies;
    `dynamic` (NTK) depends on the longest position of its row: (theta, factor, original max
    positions).
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    dynamic: tuple[float, float, int] | None = None


@dataclass(frozen=True)
class Arch:
    """One model's architecture; `config` is the JSON text of the HF config it was read from."""

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: Rope
    windows: tuple[int | None, ...]
    max_positions: int
    act: str = "silu"
    norm_eps: float = 1e-6
    qk_norm: bool = False
    biases: tuple[str, ...] = ()
    tied: bool = False
    init_std: float = 0.02
    config: str = "{}"

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each logical axis."""
        return {
            "vocab": self.vocab_size,
            "embed": self.hidden_size,
            "mlp": self.mlp_size,
            "heads": self.heads * self.head_dim,
            "kv_heads": self.kv_heads * self.head_dim,
            "head_dim": self.head_dim,
        }

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(pattern length p, repeats n) of each group of layers; p * n sums to `layers`.

        A window is static, so layers are stacked where a short pattern of windows repeats;
        otherwise each run of equal windows is a group of its own.
        """
        w, count = self.windows, self.layers
        for p in range(1, min(count, 8) + 1):
            if count % p == 0 and all(w[i] == w[i % p] for i in range(count)):
                return ((p, count // p),)
        cuts = [i for i in range(count) if i == 0 or w[i] != w[i - 1]] + [count]
        return tuple((1, b - a) for a, b in itertools.pairwise(cuts))

    def replace(self, **changes) -> "Arch":
        return dataclasses.replace(self, **changes)
