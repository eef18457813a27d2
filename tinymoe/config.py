"""The shape of a model: the paper's Table 1 names, the files that carry them, and exact parameter counts."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tinymoe.errors import InputError

# transformers' config.json: our field -> its key.
HF_KEYS = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "head_dim": "head_dim",
    "hidden_dim": "intermediate_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "context_len": "max_position_embeddings",
    "vocab_size": "vocab_size",
    "num_experts": "num_local_experts",
    "top_k_experts": "num_experts_per_tok",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "sliding_window": "sliding_window",
    "tie_embeddings": "tie_word_embeddings",
    "aux_loss_coef": "router_aux_loss_coef",
    # Ours: transformers keeps keys that it does not know. They are written only where they differ from the default.
    "z_loss_coef": "router_z_loss_coef",
    "moe_every": "moe_every",
    "capacity_factor": "router_capacity_factor",
    "router_jitter": "router_jitter",
    "noisy_top_k": "router_noisy_top_k",
    "bias_update_rate": "router_bias_update_rate",
    "expert_choice": "router_expert_choice",
}
OURS = tuple(HF_KEYS)[list(HF_KEYS).index("z_loss_coef") :]
MOE_ONLY = {"num_experts", "top_k_experts", "aux_loss_coef", *OURS}


@dataclasses.dataclass(frozen=True)
class MixtralConfig:
    """The shape of a Mixtral, or of a dense Mistral when ``num_experts`` is 0.

    The first ten fields are the rows of the paper's Table 1, and their defaults its values (Mixtral 8x7B).

    Parameters
    ----------
    dim, n_layers, head_dim, hidden_dim, n_heads, n_kv_heads, context_len, vocab_size, num_experts, top_k_experts
        Table 1. ``head_dim`` None means ``dim // n_heads``; ``num_experts`` 0 makes every block's feed-forward one
        dense SwiGLU.
    rope_theta
        Base of the rotary frequencies θ^(−2i/head_dim).
    norm_eps
        Added to the mean square in RMSNorm.
    sliding_window
        A token attends to itself and the ``sliding_window − 1`` before it; None: to all before it.
    tie_embeddings
        The output head is the embedding matrix.
    aux_loss_coef, z_loss_coef
        Weights of the Switch balance loss and of the router z-loss, each averaged over layers. The released 8x7B
        carries 0.02 for the first.
    moe_every
        Every so many blocks one has experts, and the others one dense feed-forward; 1, as in Mixtral: all have.
    capacity_factor
        c: in training an expert takes at most ⌈c · N·k/E⌉ of a batch's assignments, and what overflows skips the
        block; None: all that come. With ``expert_choice`` each takes just as many (c is 1 if None).
    router_jitter
        ε: in training the router's input is multiplied by noise, uniform in [1 − ε, 1 + ε].
    noisy_top_k
        In training normal noise is added to the router's logits, of a scale that is learnt.
    bias_update_rate
        γ: a bias by expert is added to the router's probabilities for the selection only, and after each step moved by
        γ towards balance; 0: there is none.
    expert_choice
        Experts choose tokens. Not causal: fit to compare, not to write.

    Raises
    ------
    InputError
        The fields contradict each other or one is out of range; the message says which, and what is possible.
    """

    dim: int = 4096
    n_layers: int = 32
    head_dim: int = None  # type: ignore[assignment]
    hidden_dim: int = 14336
    n_heads: int = 32
    n_kv_heads: int = 8
    context_len: int = 32768
    vocab_size: int = 32000
    num_experts: int = 8
    top_k_experts: int = 2
    rope_theta: float = 1e6
    norm_eps: float = 1e-5
    sliding_window: int | None = None
    tie_embeddings: bool = False
    aux_loss_coef: float = 0.02
    z_loss_coef: float = 0.0
    moe_every: int = 1
    capacity_factor: float | None = None
    router_jitter: float = 0.0
    noisy_top_k: bool = False
    bias_update_rate: float = 0.0
    expert_choice: bool = False

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "context_len", "vocab_size"):
            _require_integer(name, getattr(self, name), least=1)
        _require_integer("num_experts", self.num_experts, least=0)
        _require_integer("top_k_experts", self.top_k_experts, least=0 if self.num_experts == 0 else 1)
        if self.sliding_window is not None:
            _require_integer("sliding_window", self.sliding_window, least=1)
        if self.head_dim is None:
            if self.dim % self.n_heads:
                raise InputError(
                    f"dim {self.dim} is no multiple of n_heads {self.n_heads}: give head_dim, or change one"
                )
            object.__setattr__(self, "head_dim", self.dim // self.n_heads)
        _require_integer("head_dim", self.head_dim, least=2)
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}, but rotary positions turn pairs of elements: make it even")
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"n_heads {self.n_heads} is no multiple of n_kv_heads {self.n_kv_heads}: "
                "each key/value head serves the same number of query heads"
            )
        if self.num_experts == 0:
            object.__setattr__(self, "top_k_experts", 0)
        if self.top_k_experts > self.num_experts:
            raise InputError(f"top_k_experts is {self.top_k_experts}, but there are only {self.num_experts} experts")
        _require_number("rope_theta", self.rope_theta, above=0)
        _require_number("norm_eps", self.norm_eps, above=0)
        _require_number("aux_loss_coef", self.aux_loss_coef, least=0)
        _require_number("z_loss_coef", self.z_loss_coef, least=0)
        _require_number("router_jitter", self.router_jitter, least=0)
        _require_number("bias_update_rate", self.bias_update_rate, least=0)
        if self.capacity_factor is not None:
            _require_number("capacity_factor", self.capacity_factor, above=0)
        _require_integer("moe_every", self.moe_every, least=1)
        for name in ("tie_embeddings", "noisy_top_k", "expert_choice"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {_short(getattr(self, name))}; give true or false")
        if self.num_experts == 0 and any(getattr(self, name) != _DEFAULTS[name] for name in OURS[1:]):
            raise InputError("moe_every and balancing need experts: this model has none (num_experts is 0)")
        if self.router_jitter >= 1:
            raise InputError(f"router_jitter is {self.router_jitter}; give less than 1, or it turns inputs around")
        if self.moe_every > self.n_layers:
            raise InputError(
                f"moe_every is {self.moe_every}, but there are only {self.n_layers} layers: none has experts"
            )
        if self.expert_choice and (self.noisy_top_k or self.bias_update_rate):
            raise InputError("expert_choice leaves tokens nothing to choose: turn off noisy_top_k and bias_update_rate")

    # Presets. Each takes changes by name: MixtralConfig.tiny(num_experts=4).

    @classmethod
    def tiny(cls, **changes: Any) -> "MixtralConfig":
        """Return a model of 0.5 M parameters over bytes, for tests and first steps."""
        shape = dict(dim=64, n_layers=2, hidden_dim=128, n_heads=4, n_kv_heads=2, vocab_size=256)
        return cls(**(shape | changes))

    @classmethod
    def small(cls, **changes: Any) -> "MixtralConfig":
        """Return a model of 3.4 M parameters over bytes: what ``tinymoe train`` trains in minutes on two cores.

        Its sliding window is as long as the sequences it is trained on, so that it can write on beyond them.
        """
        shape = dict(dim=128, n_layers=4, hidden_dim=256, n_heads=4, n_kv_heads=2, vocab_size=256, sliding_window=128)
        return cls(**(shape | changes))

    @classmethod
    def mixtral_8x7b(cls, **changes: Any) -> "MixtralConfig":
        """Return Mixtral 8x7B: the paper's Table 1. All defaults are its own."""
        return cls(**changes)

    @classmethod
    def mixtral_8x22b(cls, **changes: Any) -> "MixtralConfig":
        """Return Mixtral 8x22B, with the vocabulary of 8x7B."""
        shape = dict(dim=6144, n_layers=56, hidden_dim=16384, n_heads=48, context_len=65536)
        return cls(**(shape | changes))

    @classmethod
    def mistral_7b(cls, **changes: Any) -> "MixtralConfig":
        """Return Mistral 7B v0.1: dense, with a sliding window of 4096 and θ = 1e4."""
        shape = dict(num_experts=0, top_k_experts=0, sliding_window=4096, rope_theta=1e4)
        return cls(**(shape | changes))

    # Parameters.

    def has_experts(self, layer: int) -> bool:
        """Return whether a block's feed-forward is a mixture: with ``moe_every`` n the last of each n blocks."""
        return self.num_experts > 0 and layer % self.moe_every == self.moe_every - 1

    @property
    def moe_layers(self) -> range:
        """The layers that have experts."""
        return range(self.moe_every - 1, self.n_layers if self.num_experts else 0, self.moe_every)

    def layer_shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return name → shape of the parameters of a block, without the ``layers.N.`` in front."""
        D, K, F, E = self.dim, self.head_dim, self.hidden_dim, self.num_experts
        shapes: dict[str, tuple[int, ...]] = {
            "attention_norm": (D,),
            "attention.wq": (self.n_heads * K, D),
            "attention.wk": (self.n_kv_heads * K, D),
            "attention.wv": (self.n_kv_heads * K, D),
            "attention.wo": (D, self.n_heads * K),
            "ffn_norm": (D,),
        }
        if self.has_experts(layer):
            shapes |= {"moe.gate": (E, D), "moe.w1": (E, F, D), "moe.w2": (E, D, F), "moe.w3": (E, F, D)}
            noise = {"moe.noise": (E, D)} if self.noisy_top_k else {}
            return shapes | noise | ({"moe.bias": (E,)} if self.bias_update_rate else {})
        return shapes | {"ffn.w1": (F, D), "ffn.w2": (D, F), "ffn.w3": (F, D)}

    def parameter_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield (name, shape) of every parameter, in the order of the forward pass."""
        yield "tok_embeddings", (self.vocab_size, self.dim)
        for layer in range(self.n_layers):
            for name, shape in self.layer_shapes(layer).items():
                yield f"layers.{layer}.{name}", shape
        yield "norm", (self.dim,)
        if not self.tie_embeddings:
            yield "output", (self.vocab_size, self.dim)

    def count_parameters(self) -> int:
        """Return the exact number of parameters, without allocating any (46,702,792,704 for 8x7B)."""
        embeddings = (1 if self.tie_embeddings else 2) * self.vocab_size * self.dim
        kinds = [(len(self.moe_layers), self.moe_every - 1), (self.n_layers - len(self.moe_layers), 0)]
        blocks = sum(n * sum(map(math.prod, self.layer_shapes(layer).values())) for n, layer in kinds if n)
        return embeddings + self.dim + blocks

    def count_active_parameters(self) -> int:
        """Return the number of parameters that one token uses: k of the E experts (12,879,925,248 for 8x7B)."""
        expert = 3 * self.hidden_dim * self.dim
        return self.count_parameters() - len(self.moe_layers) * (self.num_experts - self.top_k_experts) * expert

    # Files.

    def to_hf(self) -> dict[str, Any]:
        """Return the contents of transformers' config.json: Mixtral, or Mistral when there are no experts."""
        dense = self.num_experts == 0
        kind = "Mistral" if dense else "Mixtral"
        values = {
            key: getattr(self, name)
            for name, key in HF_KEYS.items()
            if not (dense and name in MOE_ONLY) and not (name in OURS and getattr(self, name) == _DEFAULTS[name])
        }
        return {
            "architectures": [f"{kind}ForCausalLM"],
            "model_type": kind.lower(),
            **values,
            "hidden_act": "silu",
            "bos_token_id": None,
            "eos_token_id": None,
        }

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "MixtralConfig":
        """Read the contents of transformers' config.json (Mixtral or Mistral); absent keys take its defaults."""
        kind = values.get("model_type")
        if kind not in ("mixtral", "mistral"):
            raise InputError(f"model_type is {_short(kind)}; tinymoe reads 'mixtral' and 'mistral'")
        if values.get("hidden_act", "silu") != "silu":
            raise InputError(f"hidden_act is {_short(values['hidden_act'])}; Mixtral's experts use 'silu'")
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise InputError(f"rope_parameters is {_short(rope)}; give an object with rope_theta")
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type != "default":
            raise InputError(f"rope_type is {_short(rope_type)}; tinymoe has only 'default', unscaled rotary positions")
        read = {name: values[key] for name, key in HF_KEYS.items() if key in values}
        if "rope_theta" in rope:
            read["rope_theta"] = rope["rope_theta"]
        if kind == "mistral":
            defaults = dict(num_experts=0, top_k_experts=0, sliding_window=4096, rope_theta=1e4, norm_eps=1e-6)
            read = {name: value for name, value in read.items() if name not in MOE_ONLY}
            context = 4096 * 32
        else:
            defaults = dict(rope_theta=1e6, norm_eps=1e-5, aux_loss_coef=0.001)
            context = 4096 * 32
        return cls(**(defaults | dict(context_len=context) | read))

    @classmethod
    def from_mistral(cls, values: dict[str, Any]) -> "MixtralConfig":
        """Read the contents of Mistral's params.json; experts stand under its key ``moe``."""
        shape = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps", "vocab_size")
        missing = [key for key in shape if key not in values]
        if missing:
            raise InputError(f"params.json lacks {', '.join(missing)}")
        moe = values.get("moe") or {}
        if not isinstance(moe, dict) or (moe and {"num_experts", "num_experts_per_tok"} - set(moe)):
            raise InputError(f"params.json: moe is {_short(moe)}; it needs num_experts and num_experts_per_tok")
        return cls(
            **{key: values[key] for key in shape},
            rope_theta=values.get("rope_theta") or (1e6 if moe else 1e4),
            sliding_window=values.get("sliding_window"),
            context_len=values.get("max_seq_len", values.get("model_max_length", 32768)),
            num_experts=moe.get("num_experts", 0),
            top_k_experts=moe.get("num_experts_per_tok", 0),
            tie_embeddings=values.get("tied_embeddings", False),
        )

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "MixtralConfig":
        """Read a config.json or params.json; which of the two it is shows in its keys.

        Raises
        ------
        InputError
            The file is absent, is no JSON object, or describes no model that is possible.
        """
        values = read_json_object(path)
        read = cls.from_mistral if "n_layers" in values and "model_type" not in values else cls.from_hf
        try:
            return read(values)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MixtralConfig)}
PRESETS = ("tiny", "small", "mixtral_8x7b", "mixtral_8x22b", "mistral_7b")


def load_config(name: str | os.PathLike[str]) -> MixtralConfig:
    """Return a preset by its name, or read a config file, or the one in a model directory.

    Raises
    ------
    InputError
        There is neither a preset nor a readable config of that name.
    """
    if str(name) in PRESETS:
        return getattr(MixtralConfig, str(name))()
    path = Path(name)
    try:
        is_directory = path.is_dir()
    except (OSError, ValueError):  # no file can have that name
        is_directory = False
    if is_directory:
        found = [path / file for file in ("config.json", "params.json") if (path / file).is_file()]
        if not found:
            raise InputError(f"{path} holds neither config.json nor params.json: is it a model directory?")
        path = found[0]
    if not os.path.isfile(path):
        raise InputError(f"no config {_short(str(name))}: give one of {', '.join(PRESETS)}, or a config.json")
    return MixtralConfig.from_file(path)


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises
    ------
    InputError
        The file cannot be read, or holds anything but one JSON object.
    """
    try:
        values = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds a JSON {type(values).__name__} where an object is expected")
    return values


def _require_integer(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} is {_short(value)}; give an integer")
    if not least <= value < 2**31:
        raise InputError(f"{name} is {_short(value)}; give at least {least} and less than 2³¹")


def _require_number(name: str, value: Any, *, above: float = -math.inf, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not -1e30 < value < 1e30:
        raise InputError(f"{name} is {_short(value)}; give a finite number")
    if value <= above or value < least:
        raise InputError(f"{name} is {_short(value)}; give a number {'above' if value <= above else 'of at least'} 0")


def _short(value: Any) -> str:
    # str of a huge integer raises, and of a long list fills the screen
    try:
        text = repr(value)
    except ValueError:
        text = "an integer of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."
