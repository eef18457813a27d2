r"""
Lesson 8 · The model: 46.7 billion parameters in thirty lines
=============================================================

**The question.** The parts are built: norm, rotary positions, attention, router, experts. How do they make a model,
where are its 46.7 billion parameters, and how would you notice that one of them is put together wrongly?

We count first, by hand, from the ten numbers of the paper's Table 1, and set right some counts that go around. Then
the forward pass is assembled from the components, in thirty lines, and compared with :class:`tinymoe.Mixtral` to the
last digits, on a trained model as well. Then one gradient check for every parameter. And then the assembly is broken in
eight ways of which none raises an error.

**You need** lessons 1 to 6; their components are imported. The trained model is the small checkpoint in
``lessons/checkpoint``, whose README has the command that made it.
"""

# %%
# Counting
# --------
# Table 1 of the paper, in its own names. Weights are matrices without biases; an expert has three.
import textwrap
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe import reference

LINE = "def add(a, b): return a + b"
dim, n_layers, head_dim, hidden_dim, n_heads, n_kv_heads = 4096, 32, 128, 14336, 32, 8
context_len, vocab_size, num_experts, top_k_experts = 32768, 32000, 8, 2

attention = dim * n_heads * head_dim * 2 + dim * n_kv_heads * head_dim * 2  # wq and wo, wk and wv
router = dim * num_experts
expert = 3 * dim * hidden_dim  # w1, w2, w3
norms = 2 * dim
embedding = vocab_size * dim

total = n_layers * (attention + router + num_experts * expert + norms) + dim + 2 * embedding
active = total - n_layers * (num_experts - top_k_experts) * expert
print(f"attention of a layer {attention:>15,}")
print(f"router of a layer    {router:>15,}")
print(f"one expert           {expert:>15,}")
print(f"embedding, head      {embedding:>15,} each")
print(f"total                {total:>15,}")
print(f"active per token     {active:>15,}  ({active / total:.1%})")

config = tinymoe.MixtralConfig.mixtral_8x7b()
assert total == config.count_parameters() == 46_702_792_704
assert active == config.count_active_parameters() == 12_879_925_248

# %%
# Nothing was allocated for this: ``config.parameter_shapes()`` yields names and shapes, and the count is a sum of
# products. Total is what must lie in memory; active is what one token is multiplied with, about 2 FLOPs for each weight
# (but for the embedding, which is a look-up). The picture shows what "sparse" means here, and what it does not touch.
parts = {
    "experts": (n_layers * num_experts * expert, n_layers * top_k_experts * expert),
    "attention": (n_layers * attention,) * 2,
    "embedding and head": (2 * embedding,) * 2,
    "router and norms": (n_layers * (router + norms) + dim,) * 2,
}
assert [sum(column) for column in zip(*parts.values())] == [total, active]

figure, axis = plt.subplots(figsize=(8, 2.2), layout="constrained")
left = np.zeros(2)
for name, sizes in parts.items():
    axis.barh(["in memory", "used by a token"], np.array(sizes) / 1e9, left=left / 1e9, label=name)
    left += sizes
axis.invert_yaxis()
axis.set(xlabel="billion parameters")
figure.suptitle("Mixtral 8x7B: of 46.7 billion parameters a token uses 12.9; only experts are sparse")
axis.legend(fontsize=8, loc="lower right")
plt.show()

# %%
# Counts that go around, and the arithmetic:
claims = [
    ("8 x 7B = 56 billion", f"{total / 1e9:.1f} billion: attention, embeddings, norms and head are shared"),
    ("an expert has 7 billion", f"{n_layers * expert / 1e9:.2f} over all layers, {expert / 1e6:.0f} million in one"),
    ("the router has 100 million", f"{n_layers * router / 1e6:.2f} million, all layers together"),
    ("attention: 200 million a layer", f"{attention / 1e6:.1f} million; 67.1 if no keys and values were shared"),
    ("shared 11.5 billion", f"{(total - parts['experts'][0]) / 1e9:.2f}; the experts {parts['experts'][0] / 1e9:.2f}"),
    ("2 of 8 experts: 2/8 of the cost", f"{active / total:.1%} of the weights: a quarter of the experts, and the rest"),
    ("needs less memory than dense", f"{2 * total / 1e9:.1f} GB in bfloat16: memory follows total, compute active"),
]
for claim, truth in claims:
    print(f"{claim:32} {truth}")
cache = 2 * n_layers * n_kv_heads * head_dim * context_len * 2
print(f"keys and values of one full context, bfloat16: {cache / 1e9:.2f} GB")

# %%
# Thirty lines
# ------------
# A block reads the **residual stream** x, a row of D numbers per token, and adds to it, twice:
#
# .. math:: x \leftarrow x + \mathrm{attention}(\mathrm{norm}(x)), \qquad x \leftarrow x +
#           \mathrm{MoE}(\mathrm{norm}(x)).
#
# Nothing is ever overwritten, so the last layer can still read what the first wrote. All rows of all sequences lie in
# one (B·T, D) array; only attention must know which belong together. The components come through ``ops``, so that a
# part can be exchanged, as a backend does, or a mistake.


def attend(ops, config, w, h, shape):
    """h (B·T, D) -> (B·T, D): tokens look at those before them."""
    B, T = shape
    rotation = ops.rope_table(np.arange(T), config.head_dim, config.rope_theta, h.dtype)  # (T, K/2)
    q, k, v = (ops.linear(h, w(f"attention.w{name}"))[0].reshape(B, T, -1, config.head_dim) for name in "qkv")
    q, k = ops.rope(q, rotation)[0], ops.rope(k, rotation)[0]  # (B, T, H, K), (B, T, G, K)
    o, _ = ops.attention(q, k, v, config.sliding_window)  # (B, T, H, K)
    return ops.linear(o.reshape(B * T, -1), w("attention.wo"))[0]


def mix(ops, config, w, h):
    """h (B·T, D) -> (B·T, D): each token by itself, through k of the E experts."""
    return ops.moe(h, *(w(f"moe.{name}") for name in ("gate", "w1", "w2", "w3")), config.top_k_experts)[0]


def forward(params, config, tokens, ops=reference):
    """tokens (B, T) -> logits (B, T, V) of each next token."""
    x, _ = ops.embedding(tokens.ravel(), params["tok_embeddings"])  # (B·T, D)
    for layer in range(config.n_layers):

        def w(name, layer=layer):
            return params[f"layers.{layer}.{name}"]

        h, _ = ops.rmsnorm(x, w("attention_norm"), config.norm_eps)
        x = x + attend(ops, config, w, h, tokens.shape)
        h, _ = ops.rmsnorm(x, w("ffn_norm"), config.norm_eps)
        x = x + mix(ops, config, w, h)
    x, _ = ops.rmsnorm(x, params["norm"], config.norm_eps)
    return ops.linear(x, params["output"])[0].reshape(*tokens.shape, -1)


# %%
# That is a Mixtral. Random weights of a micro model first, then the trained one, against the library:
tokens = np.frombuffer(LINE.encode(), np.uint8).astype(np.int64)[None]  # (1, T)
micro = tinymoe.MixtralConfig(
    dim=16, n_layers=2, hidden_dim=24, n_heads=4, n_kv_heads=2, vocab_size=256, num_experts=4, sliding_window=12
)
untrained = tinymoe.Mixtral.init(micro, seed=0, dtype="float64")
repository = Path(tinymoe.__file__).parents[1]
trained = tinymoe.Mixtral.from_pretrained(repository / "lessons/checkpoint")

for name, model in (("micro", untrained), ("trained", trained)):
    logits = forward(model.params, model.config, tokens)
    difference = abs(logits - model(tokens)).max() / abs(logits).max()
    print(
        f"{name:8} {model.config.count_parameters():>9,} parameters, logits {logits.shape}, differ by {difference:.0e}"
    )
    assert difference < 1e-5

# %%
# What does the trained one say? At each position it has read the line so far, and gives 256 probabilities:
probs = reference.softmax(forward(trained.params, trained.config, tokens)[0])
for end in (4, 15, 21, 26):
    best = np.argsort(-probs[end - 1])[:4]
    guesses = ", ".join(f"{chr(b)!r} {probs[end - 1, b]:.2f}" for b in best)
    print(f"after {LINE[:end]!r:30} {guesses}   (in the line: {LINE[end]!r})")

# %%
# Every parameter's gradient
# --------------------------
# Backward, the residual stream is the simplest thing there is. From :math:`y = x + f(x)` follows
# :math:`dx = dy + (\partial f)^\top dy`: the gradient of the sum goes *unchanged* past the block, and what comes back
# through the block is added. So however deep the model, the first layer hears the loss directly. Each block's backward
# is its components' backwards in reverse order, thirty lines in ``tinymoe/block.py``.
#
# We check all of it at once, through our own forward, in float64. The weights are made ten times larger than they are
# drawn, because near zero a model is nearly linear and hides mistakes. For each array one random direction, central
# differences, and the slope beside :math:`\sum d \cdot \text{gradient}`.
rng = np.random.default_rng(1)
params = {name: p * (1 if name.endswith("norm") else 10) for name, p in untrained.params.items()}
inputs, targets = tokens[:, :-1], tokens[:, 1:]


def loss_of(params):
    logits = forward(params, micro, inputs)
    return reference.cross_entropy(logits.reshape(-1, 256), targets.ravel())[0]


loss, grads = tinymoe.Mixtral(micro, params).loss_and_grads(inputs, targets, aux_loss_coef=0.0)
assert abs(loss - loss_of(params)) < 1e-12
worst, h = {}, 1e-6
for name, p in params.items():
    d = rng.standard_normal(p.shape)
    slope = (loss_of({**params, name: p + h * d}) - loss_of({**params, name: p - h * d})) / (2 * h)
    error = abs(slope - (d * grads[name]).sum()) / np.linalg.norm(grads[name])
    kind = name.split(".", 2)[-1]
    worst[kind] = max(worst.get(kind, 0), error)
for kind, error in worst.items():
    print(f"{kind:16} off by {error:.1e} of its gradient's length")
assert max(worst.values()) < 1e-6
print(f"{len(params)} arrays, {sum(p.size for p in params.values()):,} parameters")

# %%
# Before any training the loss should be close to :math:`\ln 256 = 5.545`, that of a model which finds all bytes equally
# likely: with small weights all logits are near zero. A first loss far from it is the first sign of a wrong assembly,
# and costs one forward pass.
first = untrained.loss(inputs, targets)
print(f"untrained: {first:.3f}, ln 256 = {np.log(256):.3f}")
assert abs(first - np.log(256)) < 0.05

# %%
# Broken on purpose
# -----------------
# Eight assemblies, each with one part exchanged for a plausible one. Several are known from published code. The
# shapes are right, nothing is raised, and a model *trained* with most of them would learn well enough. But load weights
# that were trained with the right parts, and the loss on a piece of Python's library tells them apart.
text = np.frombuffer(Path(textwrap.__file__).read_bytes()[:4097], np.uint8).astype(np.int64)
windows, following = text[:-1].reshape(32, 128), text[1:].reshape(32, 128)


def exchanged(**parts):
    return SimpleNamespace(**{**{name: getattr(reference, name) for name in reference.__all__}, **parts})


def by_halves(x, rotation):  # pairs (j, j + K/2), as transformers' files have them, with weights in the other order
    a, b = np.split(x, 2, axis=-1)
    real, imaginary = rotation.real[:, None], rotation.imag[:, None]
    return np.concatenate([a * real - b * imaginary, a * imaginary + b * real], axis=-1), None


def scaled_by_dim(q, k, v, window):
    return reference.attention(q * (q.shape[3] / trained.config.dim) ** 0.5, k, v, window)


def tiled_heads(q, k, v, window):  # query head h takes key head h mod G, not h // R
    H, G = q.shape[2], k.shape[2]
    order = np.arange(H).reshape(-1, G).T.ravel()
    o, saved = reference.attention(np.ascontiguousarray(q[:, :, order]), k, v, window)
    return o[:, :, np.argsort(order)], saved


def not_renormalised(x, gate, w1, w2, w3, k):
    probs = reference.softmax(x @ gate.T)
    share = np.sort(probs, axis=1)[:, -k:].sum(axis=1, keepdims=True)
    return reference.moe(x, gate, w1, w2, w3, k)[0] * share, None


def swapped(x, gate, w1, w2, w3, k):
    return reference.moe(x, gate, w3, w2, w1, k)


def shifted_window(q, k, v, window):  # a token sees W keys before it and itself: one too many
    return reference.attention(q, k, v, window + 1)


broken = {
    "right": reference,
    "eps of the norm 10 times as large": exchanged(rmsnorm=lambda x, w, eps: reference.rmsnorm(x, w, 10 * eps)),
    "window of W + 1": exchanged(attention=shifted_window),
    "weights not renormalised": exchanged(moe=not_renormalised),
    "w1 and w3 swapped": exchanged(moe=swapped),
    "attention scaled by dim": exchanged(attention=scaled_by_dim),
    "heads tiled, not repeated": exchanged(attention=tiled_heads),
    "rotation by halves": exchanged(rope=by_halves),
    "no rotation": exchanged(rope=lambda x, rotation: (x, None)),
}
losses = {}
for name, ops in broken.items():
    logits = forward(trained.params, trained.config, windows, ops)
    losses[name] = reference.cross_entropy(logits.reshape(-1, 256), following.ravel())[0]
    print(f"{name:34} {losses[name]:.4f} nats per byte")

figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
axis.barh(list(losses), list(losses.values()), color=["C2"] + ["C3"] * (len(losses) - 1))
axis.axvline(losses["right"], color="black", linewidth=0.8, linestyle=":")
axis.axvline(np.log(256), color="grey", linewidth=0.8)
axis.text(np.log(256), len(losses) - 0.4, " ln 256", fontsize=8, color="grey", va="bottom")
axis.invert_yaxis()
axis.set(xlabel="nats per byte")
figure.suptitle("One trained model in nine assemblies: some mistakes cost much, some cannot be seen")
plt.show()
assert losses["right"] < 2
assert losses["no rotation"] > losses["right"] + 0.3
assert abs(losses["window of W + 1"] - losses["right"]) < 1e-6

# %%
# The first two of the broken ones are the ones to remember. Windows are 128 bytes here and the sequences are no longer,
# so a window that is off by one changes nothing at all, and a larger ε next to nothing. A loss is not a test. What
# finds them is equality to the last digits against an independent implementation, at sizes where the part matters:
# the tests hold these logits to files that transformers wrote, with windows shorter than the text.
#
# Remember
# --------
# * 46.7 billion in memory, 12.9 per token; of the latter, 11.3 are the two experts of each layer.
# * A block adds to the residual stream twice, each time from a normalised copy. Backward, the sum passes the gradient
#   on.
# * Thirty lines assemble the model. The first loss should be ln V.
# * Most wrong assemblies run, and train. Compare numbers, not shapes; and choose sizes that could show the mistake.
#
# **Ask yourself.** (a) Why is a router of 8 rows enough for 4096 numbers a token? (b) Which parameters would an 8x7B
# with top-1 use per token, and how many? (c) What would tied embeddings save? (d) Where in the thirty lines do two
# tokens meet? (e) Why must a check of gradients use weights that are not near zero?
#
# Exercises
# ---------
# 1. Count Mixtral 8x22B from :meth:`tinymoe.MixtralConfig.mixtral_8x22b`'s fields by the formula above.
# 2. Show that the model is causal: change the last token and compare all logits before it. Do the same with the order
#    of the experts: permute the stacks and the gate's rows, and compare all logits.
# 3. Divide w1 of every expert by 2 and multiply w3 by 2. Does the model change? And with w2 in place of w1?

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) it only ranks eight directions in a space of 4096, it computes nothing of the answer; (b) one expert
# less per layer, 12.88 − 32 · 0.176 = 7.24 billion; (c) 131,072,000 parameters; (d) in ``ops.attention`` alone; (e)
# where all functions are nearly linear, a wrong second-order term does not show, and gradients are so small that
# rounding hides them.
#
# 1. The same formula, other numbers:
large = tinymoe.MixtralConfig.mixtral_8x22b()
of_layer = 2 * large.dim * large.head_dim * (large.n_heads + large.n_kv_heads) + large.dim * (large.num_experts + 2)
of_layer += large.num_experts * 3 * large.dim * large.hidden_dim
counted = large.n_layers * of_layer + large.dim + 2 * large.vocab_size * large.dim
print(f"{counted:,}")
assert counted == large.count_parameters() == 140_620_634_112

# %%
# 2. Earlier logits do not move by a bit; and the name of an expert means nothing.
other = tokens.copy()
other[0, -1] = ord("!")
before, after = (forward(untrained.params, micro, t) for t in (tokens, other))
assert abs(before - after)[:, :-1].max() < 1e-12
order = np.array([2, 0, 3, 1])
renamed = {name: p[order] if ".moe." in name else p for name, p in untrained.params.items()}
assert abs(forward(renamed, micro, tokens) - before).max() < 1e-12

# %%
# 3. With w1 it does: silu is not linear, and :math:`\mathrm{silu}(z/2) \ne \mathrm{silu}(z)/2`. Between w2 and w3 a
#    factor can be moved freely, because both act linearly: infinitely many weights are the same model.
for name, same in (("w1", False), ("w2", True)):
    scale = {name: 0.5, "w3": 2.0}
    moved = {n: p * scale.get(n.split(".")[-1], 1.0) if ".moe." in n else p for n, p in params.items()}
    difference = abs(forward(moved, micro, tokens) - forward(params, micro, tokens)).max()
    print(name, f"halved and w3 doubled: logits differ by {difference:.1e}")
    assert (difference < 1e-10) == same

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 9 </lessons/lesson_09_training>` trains a model from ln 256 down, in seconds, and shows what
# goes wrong without each of its precautions.
