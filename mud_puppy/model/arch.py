"""What one decoder-only transformer is: every difference between families, as data.

One legend for the letters of the whole package:

    B batch      T tokens (queries)   S cache slots or key length   D hidden_size   V vocab_size
    H heads      K kv_heads           hd head_dim                   F mlp_size      L layers
    E experts    k experts of a token

`Arch` is hashable and holds no arrays, so it is a static argument of every jitted function. It is
read from a Hugging Face config by `families.read_config`.
"""

import dataclasses
import itertools
from dataclasses import dataclass


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: the angle of pair d at position p is `p * inv_freq[d]`.

    The first `2 * len(inv_freq)` of a head's numbers are rotated, the rest stays. cos and sin are
    multiplied by `scale`. Every scaling kind but two is a table of frequencies; `dynamic` (NTK)
    depends on the longest position of its row: (theta, factor, original max positions), and so does
    `long` (LongRoPE): the frequencies of rows longer than that many positions.
    """

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    dynamic: tuple[float, float, int] | None = None
    long: tuple[tuple[float, ...], int] | None = None


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: which experts a token goes to, and with which weights.

    count, size: E experts of `size` inner units; shared: inner units of the expert that sees all
    tokens (0: none). per_token: k. score: how router logits become weights: "softmax" over all
    experts, "sigmoid", or "softmax_chosen" over the k chosen ones. renormalize: the k weights are
    divided by their sum; scale: multiplied then. groups: experts come in so many groups, of which
    the best `groups_per_token` are looked at; a group is as good as its best expert, or with
    `group_pairs` as its best two together.
    """

    count: int
    size: int
    per_token: int
    shared: int = 0
    score: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    groups_per_token: int = 1
    group_pairs: bool = False


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434): keys and values of all heads are
    made from `kv_rank` numbers a token, queries from `q_rank` (None: from the hidden state).

    A head's key is `nope` numbers of its own and `rotated` ones that all heads share; its value is
    `value` numbers.
    """

    q_rank: int | None
    kv_rank: int
    nope: int
    rotated: int
    value: int


@dataclass(frozen=True)
class Layer:
    """What is static of one layer: its window, which of `Arch.ropes` it has, whether experts."""

    window: int | None = None
    rope: int | None = 0
    sparse: bool = False


@dataclass(frozen=True)
class Arch:
    """One model's architecture; `config` is the JSON text of the HF config it was read from.

    ropes: the kinds of rotary embedding; kinds: each layer. learned_positions: an embedding of
    positions beside that of tokens. act: of the MLP; act_limit: gates and inputs are clipped
    there, and the act is gpt-oss's. norm: "rms" or "layer"; a norm multiplies by norm_offset + its
    weight. norms: which a block has: before its parts (`attn_norm`, `mlp_norm`), after
    (`attn_post_norm`, `mlp_post_norm`). parallel: attention and MLP read the same hidden state.
    qk_norm: none, of each head ("head", its weight for one head or, "heads", for all), of the whole
    width ("width"). qkv_by_head: a fused projection is q, k, v of one head after the other.
    interleaved: rope rotates neighbours (2 d, 2 d + 1), not (d, d + hd / 2). biases: modules that
    have one. renames: (HF's path of a module, ours). modules: HF's names of embedding, layers and
    head. task: what the head gives: "lm", logits of the next token; "sequence" or "token",
    `labels` scores of a text or of each token (`families.heads`).
    """

    family: str
    vocab_size: int
    hidden_size: int
    mlp_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    kinds: tuple[Layer, ...]
    ropes: tuple[Rope, ...] = ()
    learned_positions: bool = False
    interleaved: bool = False
    act: str = "silu"
    act_limit: float | None = None
    norm: str = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    norms: tuple[str, ...] = ("attn_norm", "mlp_norm")
    norm_biases: bool = False
    parallel: bool = False
    qk_norm: str | None = None
    qkv_by_head: bool = False
    sinks: bool = False
    attn_scale: float | None = None
    attn_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    experts: Experts | None = None
    latent: Latent | None = None
    biases: tuple[str, ...] = ()
    tied: bool = False
    renames: tuple[tuple[str, str], ...] = ()
    modules: tuple[str, str, str] = ("model.embed_tokens", "model.layers.", "lm_head")
    task: str = "lm"
    labels: int = 0
    init_std: float = 0.02
    config: str = "{}"

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def value_dim(self) -> int:
        """Numbers of one head's value."""
        return self.latent.value if self.latent else self.head_dim

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each logical axis."""
        heads, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes = {
            "vocab": self.vocab_size,
            "positions": self.max_positions,
            "embed": self.hidden_size,
            "mlp": self.mlp_size,
            "gate_up": 2 * self.mlp_size,
            "heads": heads,
            "kv_heads": kv,
            "qkv": heads + 2 * kv,
            "head_dim": self.head_dim,
            "head": self.heads,
            "kv_head": self.kv_heads,
            "one": 1,
            "labels": self.labels,
        }
        if self.experts is not None:
            sizes |= {
                "experts": self.experts.count,
                "expert_mlp": self.experts.size,
                "expert_gate_up": 2 * self.experts.size,
                "shared_mlp": self.experts.shared,
            }
        if self.latent is not None:
            own = self.latent
            sizes |= {
                "q_rank": own.q_rank or 0,
                "q_latent": own.q_rank or 0,
                "kv_rank": own.kv_rank,
                "kv_rank_rotated": own.kv_rank + own.rotated,
                "keys_values": self.heads * (own.nope + own.value),
                "values": self.heads * own.value,
            }
        return sizes

    @property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(pattern length p, repeats n) of each group of layers; p * n sums to `layers`.

        What differs between layers is static, so they are stacked where a short pattern of kinds
        repeats, from the first layer of the dense and of the sparse ones on; otherwise each run of
        equal kinds is a group of its own.
        """
        kinds, groups = self.kinds, []
        cuts = [i for i, kind in enumerate(kinds) if i == 0 or kind.sparse != kinds[i - 1].sparse]
        # Dense and sparse layers in turn are a pattern of their own.
        spans = [kinds] if len(cuts) > 2 else [kinds[a:b] for a, b in _pairs(cuts, len(kinds))]
        for span in spans:
            groups += _patterns(span)
        return tuple(groups)

    def replace(self, **changes) -> "Arch":
        return dataclasses.replace(self, **changes)


def _patterns(kinds: tuple[Layer, ...]) -> list[tuple[int, int]]:
    count = len(kinds)
    for p in range(1, min(count, 8) + 1):
        if count % p == 0 and all(kinds[i] == kinds[i % p] for i in range(count)):
            return [(p, count // p)]
    # A pattern that breaks off (gemma 3: 26 layers, every sixth is global) repeats up to there.
    for p in range(2, min(count // 2, 8) + 1):
        whole = count - count % p
        if all(kinds[i] == kinds[i % p] for i in range(count)):
            return [(p, whole // p), *_patterns(kinds[whole:])]
    cuts = [i for i in range(count) if i == 0 or kinds[i] != kinds[i - 1]]
    return [(1, b - a) for a, b in _pairs(cuts, count)]


def _pairs(cuts: list[int], end: int) -> list[tuple[int, int]]:
    return list(itertools.pairwise([*cuts, end]))
