r"""
Lesson 11 · What experts learn: bytes more than topics
======================================================

**The question.** Eight experts, and nobody told any of them what to do. Did one become the expert for code, another the
one for prose? How would one tell a habit from chance?

Section 5 of the paper asks this of Mixtral 8x7B and finds no pattern by topic, but that neighbouring tokens share
experts more often than by chance. We ask it of a small trained model, with the same three measures: which expert gets
how much of which text, how often neighbours agree, and how sure the router is. Each is built here, beside what chance
would give, because nearly every mistake in this field is a number without its chance level. One of the findings does
not survive that.

**You need** the router of :doc:`lesson 5 </lessons/lesson_05_router>` and the load of
:doc:`lesson 7 </lessons/lesson_07_balance>`. The model is read, not trained: ``lessons/checkpoint``, three layers of
8 experts, top-2, trained on Python's own library as bytes; its README has the command. So is the record of a larger
one, ``docs/results/routing-demo.json``: the model of ``make demo``, seen by ``tinymoe analyze``.
"""

# %%
# One line, token by token
# ------------------------
# A router says of each token which experts it prefers, first choice first. Of our line, in every layer:
import itertools
import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe.analysis import colours, routing
from tinymoe.analysis.observe import observe, sample
from tinymoe.corpora import standard_library
from tinymoe.tokenizer import ByteTokenizer

LINE = "def add(a, b): return a + b"
repository = Path(tinymoe.__file__).parents[1]
model = tinymoe.Mixtral.from_pretrained(repository / "lessons/checkpoint")
E, k, L = model.config.num_experts, model.config.top_k_experts, model.config.n_layers

tokens = np.frombuffer(LINE.encode(), np.uint8).astype(np.int64)  # (T,)
of_line = np.stack([experts for _, experts, _ in model.routing(tokens[None])])  # (L, T, k)
print("choices", of_line.shape)
for layer in range(L):
    print(f"layer {layer}, first choices:", *of_line[layer, :, 0])

# %%
figure, axes = plt.subplots(figsize=(10, 1.9), layout="constrained")
palette = colours(E)
for layer, t in np.ndindex(L, len(tokens)):
    expert = of_line[layer, t, 0]
    axes.add_patch(plt.Rectangle((t, layer), 1, 1, facecolor=palette[expert], edgecolor="white"))
    axes.text(t + 0.5, layer + 0.42, LINE[t].replace(" ", "␣"), ha="center", va="center", family="monospace")
    axes.text(t + 0.95, layer + 0.95, expert, ha="right", va="bottom", fontsize=6)
axes.set(xlim=(0, len(tokens)), ylim=(L, 0), xticks=[])
axes.set_yticks(np.arange(L) + 0.5, [f"layer {layer}" for layer in range(L)])
axes.spines[:].set_visible(False)
axes.tick_params(left=False)
axes.set_title("The line coloured by first choice: in layer 0 a letter keeps its expert, deeper it depends on the past")
plt.show()

# %%
# In layer 0 every letter has one colour wherever it stands, and only the space has two. Deeper, letters change theirs.
# That is a suspicion. To make it a finding takes more text: 12,000 held-out bytes each of code, of prose (the language
# reference) and of docstrings, in windows of the 128 bytes that the model was trained on.
kept = [len(set(of_line[layer, tokens == byte, 0])) for layer in range(L) for byte in set(LINE.encode()) - {ord(" ")}]
print("experts of a byte of the line, at most, by layer:", np.reshape(kept, (L, -1)).max(axis=1))
documents = standard_library().held_out_tokens(ByteTokenizer())
texts = {domain: observe(model, sample(documents[domain], 128, 12_000), 128) for domain in documents}
for domain, text in texts.items():
    print(f"{domain:<11} tokens {text.tokens.shape}, experts {text.experts.shape}, probs {text.probs.shape}")

# %%
# Share per expert and text
# -------------------------
# Count first choices, divide by the number of tokens. If load were even, every share would be 1/8.


def share(first):
    return np.bincount(first, minlength=E) / len(first)


shares = {domain: np.stack([share(of_layer[:, 0]) for of_layer in text.experts]) for domain, text in texts.items()}
for layer, domain in itertools.product(range(L), shares):
    print(f"layer {layer} {domain:<11}", " ".join(f"{100 * value:5.1f}" for value in shares[domain][layer]), "%")

# %%
# How far may a share be off by luck? For N independent tokens its standard deviation is
# :math:`\sqrt{p(1 - p)/N}`. But neighbours are not independent, and a document differs from the next: what counts as
# one observation is rather a document, or a stretch of text. :func:`tinymoe.analysis.routing.shares` estimates from
# blocks of text how many independent tokens the N are worth, and gives 95 % intervals. They are wider, here by
figures = {domain: routing.summarise(text) for domain, text in texts.items()}
for domain, of_domain in figures.items():
    found = of_domain["layers"][0]["first"]
    p, low, high = (np.array(found[key]) for key in ("share", "low", "high"))
    np.testing.assert_allclose(p, shares[domain][0])
    naive = 2 * 1.96 * np.sqrt(p * (1 - p) / of_domain["tokens"])
    print(f"{domain:<11} a factor of {np.median((high - low) / naive):.1f}, from {of_domain['blocks']} blocks")

# %%
figure, axes = plt.subplots(1, L, figsize=(10, 2.9), layout="constrained", sharey=True)
for layer, axis in enumerate(axes):
    for number, (domain, of_domain) in enumerate(figures.items()):
        p, low, high = (100 * np.array(of_domain["layers"][layer]["first"][key]) for key in ("share", "low", "high"))
        x = np.arange(E) + 0.27 * (number - 1)
        axis.bar(x, p, 0.25, label=domain, yerr=[p - low, high - p], error_kw={"elinewidth": 0.8})
    axis.axhline(100 / E, color="black", linestyle="--", linewidth=0.8)
    axis.set(title=f"layer {layer}", xlabel="expert", xticks=range(E))
axes[0].set_ylabel("first choices, %")
axes[0].legend(fontsize=8)
figure.suptitle("Share of each expert: code differs from English, prose and docstrings are close")
plt.show()

# %%
# Load does differ, and most between code on one side and the two kinds of English on the other. A few experts have
# several times as much of one as of the other; none has one text for itself. How far apart two texts are can be put in
# one number, the share of tokens that would
# have to change their expert to turn one into the other, :math:`\frac12 \sum_e |p_e - q_e|`:
for layer in range(L):
    apart = {}
    for a, b in itertools.combinations(shares, 2):
        apart[f"{a} / {b}"] = abs(shares[a][layer] - shares[b][layer]).sum() / 2
    print(f"layer {layer}:", ", ".join(f"{pair} {100 * value:.0f} %" for pair, value in apart.items()))
    assert apart["code / prose"] > apart["prose / docstrings"]

# %%
# Is it the topic, or the letters?
# --------------------------------
# Code has other bytes than prose. If a byte has its expert, texts differ in load without anyone knowing topics. How
# much of the choice does the byte alone determine? With H the entropy of the choices e, and b the byte, the share is
#
# .. math:: \frac{I(b; e)}{H(e)}, \qquad I(b; e) = \sum_{b, e} p(b, e) \log \frac{p(b, e)}{p(b) \, p(e)},
#           \qquad H(e) = -\sum_e p(e) \log p(e),
#
# 1 if the byte decides, 0 if it says nothing. A table filled from few tokens pretends to some information even where
# there is none, so the chance level comes from the same table with the bytes shuffled.


def determined(bytes_, first):
    counts = np.zeros((256, E))
    np.add.at(counts, (bytes_, first), 1)
    p = counts / len(first)
    expected = np.outer(p.sum(axis=1), p.sum(axis=0))
    seen, of_expert = p > 0, p.sum(axis=0)[p.sum(axis=0) > 0]
    return (p[seen] * np.log(p[seen] / expected[seen])).sum() / -(of_expert * np.log(of_expert)).sum()


rng = np.random.default_rng(0)
for domain, text in texts.items():
    found = [determined(text.tokens, of_layer[:, 0]) for of_layer in text.experts]
    chance = determined(rng.permutation(text.tokens), text.experts[0, :, 0])
    print(f"{domain:<11} by layer:", " ".join(f"{value:5.0%}" for value in found), f"(shuffled: {chance:.0%})")
    assert found[0] > 0.7 > found[2] > 3 * chance

# %%
# In layer 0 about nine tenths of the choice are settled by the byte itself. Deeper it is little more than half: the
# rest comes from context. These experts divide the alphabet, and later what stands before it; they do not divide
# subjects. (Tokens of a real model are pieces of words, which leaves more room for meaning than single bytes do.)
#
# Do neighbours share experts?
# ----------------------------
# The paper's table 5 counts how often two consecutive tokens have the same first choice, and how often they have any of
# their two choices in common. What would chance give? If all sets of k experts are equally likely, the second token
# avoids the first one's k with probability :math:`\binom{E-k}{k} / \binom{E}{k}`:
#
# .. math:: \text{first choice: } \frac18 = 12.5\,\%, \qquad
#           \text{either of two: } 1 - \frac68 \cdot \frac57 = \frac{13}{28} = 46.4\,\%.
#
# Six of eight experts are left for its first choice, five of seven for its second. All 28 · 28 cases agree:
sets = list(itertools.combinations(range(E), k))
common = np.mean([bool(set(a) & set(b)) for a in sets for b in sets])
print(f"{len(sets)} sets; in common {common:.4f} = 13/28 = {13 / 28:.4f}")
assert np.isclose(common, 13 / 28)
assert np.isclose(common, routing.repetition_by_chance(E, k))
assert routing.repetition_by_chance(E, 1) == 1 / 8

# %%
# An uneven load alone makes tokens agree: of two independent ones, both choose e with probability :math:`p_e^2`, and
# :math:`\sum_e p_e^2 \ge 1/E`, with equality only for an even load. So beside "by chance" belongs "by chance **at this
# load**". It can be computed from the shares, or simulated by shuffling the tokens, which keeps the load and destroys
# the neighbourhood.


def repeats(experts, window):
    """Return whether neighbours in a window have an expert in common, (P,), and where the first of each pair stands."""
    at = np.flatnonzero(window[1:] == window[:-1])  # no pair reaches over the end of a window
    return (experts[at, :, None] == experts[at + 1, None, :]).any(axis=(1, 2)), at


first = texts["code"].experts[0, :, :1]  # (N, 1)
by_load = (shares["code"][0] ** 2).sum()
shuffled = np.mean([repeats(rng.permutation(first), texts["code"].window)[0].mean() for _ in range(20)])
print(f"code, layer 0: at this load {by_load:.4f}, shuffled {shuffled:.4f}, evenly {1 / E:.4f}")
np.testing.assert_allclose(by_load, routing.repetition_by_load(first, E), rtol=1e-5)
assert abs(shuffled - by_load) < 0.005

print("\nneighbours in common, % (chance at this load)   first choice      either of two")
for layer, (domain, text) in itertools.product(range(L), texts.items()):
    cells = []
    for choices, key in ((1, "repeat_first"), (k, "repeat_chosen")):
        seen = repeats(text.experts[layer, :, :choices], text.window)[0].mean()
        library = figures[domain]["layers"][layer][key]
        np.testing.assert_allclose(seen, library["share"])
        half = 50 * (library["high"] - library["low"])
        cells.append(f"{100 * seen:5.1f} ± {half:3.1f} ({100 * library['by_load']:4.1f})")
    print(f"layer {layer} {domain:<38}", "   ".join(cells))

# %%
# Code is far above chance, at its own load, too, and its 57 to 68 % for either of two choices look like the paper's 62
# to 67 % at layer 15. English is much nearer to chance. A tempting conclusion: the router of code thinks in larger
# units. Look at what these neighbours are first.
#
# The same byte twice
# -------------------
# Code is indented. Split the pairs: those of two equal bytes, most of them spaces, and those of two different ones. The
# latter need a chance of their own, lower than that at the layer's load, since different bytes have different experts:
# shuffle the second bytes of these pairs, and keep what differs.
print("repeated, %      first choice: equal   different   (chance)    either of two: equal   different   (chance)")
beyond = {}
for layer, (domain, text) in itertools.product(range(L), texts.items()):
    cells = []
    for choices in (1, k):
        repeated, at = repeats(text.experts[layer, :, :choices], text.window)
        equal = text.tokens[at] == text.tokens[at + 1]
        one, other, agreed = at[~equal], at[~equal] + 1, []
        for _ in range(5):
            other = rng.permutation(other)
            pairs = text.experts[layer, one, :choices, None] == text.experts[layer, other, None, :choices]
            agreed.append(pairs.any(axis=(1, 2))[text.tokens[one] != text.tokens[other]].mean())
        beyond[layer, domain, choices] = repeated[~equal].mean() - np.mean(agreed)
        cells.append(f"{repeated[equal].mean():16.1%}{repeated[~equal].mean():12.1%}     ({np.mean(agreed):.1%})")
    print(f"layer {layer} {domain:<11}", "    ".join(cells))
assert max(value for (_, _, choices), value in beyond.items() if choices == 1) < 0.05

text = texts["code"]
at = repeats(text.experts[0], text.window)[1]
equal = text.tokens[at] == text.tokens[at + 1]
spaces = (text.tokens[at][equal] == ord(" ")).mean()
print(f"code: {equal.mean():.0%} of neighbours are equal bytes, {spaces:.0%} of these are spaces")

# %%
# For first choices that was nearly all of it: two different neighbours share theirs within three points of chance,
# everywhere. What lies above are runs of one byte. For either of two choices something is left in the deeper layers of
# all texts, about ten points in code and five in English: there, neighbours that differ do share experts, and the
# paper's effect survives in a small form. The paper
# itself notes that Mixtral's indentation goes to the same experts. Its tokens are pieces of words, so how much of its
# table is of this kind we cannot say. But a table of repetitions alone does not tell.
#
# How sure is the router?
# -----------------------
# The entropy of a token's probabilities, :math:`-\sum_e p_e \ln p_e`, is ln 8 = 2.08 if it has no preference and 0 if
# it has only one; :math:`e^H` reads as a number of experts among which it hesitates. Beside it, the margin by which the
# second choice beats the third: what is small there is decided by rounding (lesson 5).
for layer in range(L):
    probs = np.concatenate([text.probs[layer] for text in texts.values()]).astype(np.float64)  # (N, E)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(axis=1)
    ranked = np.sort(probs, axis=1)
    margin = ranked[:, -2] - ranked[:, -3]
    np.testing.assert_allclose(entropy.mean(), routing.entropy(probs), rtol=1e-9)
    np.testing.assert_allclose(margin.mean(), routing.margin(probs, 2), rtol=1e-9)
    print(f"layer {layer}: {entropy.mean():.2f} nats, as of {np.exp(entropy.mean()):.1f} experts; ", end="")
    print(f"second before third by {margin.mean():.3f}, by less than 0.01 for {(margin < 0.01).mean():.0%} of tokens")
    assert entropy.mean() < np.log(E)

# %%
# Deeper routers are surer: from six experts down to three. Yet a sixth of the second choices is decided by less than
# 0.01.
#
# The larger demo, from its record
# --------------------------------
# The same measures of a model of 3.4 M parameters, four layers, on up to 50,000 bytes of each text:
record = json.loads((repository / "docs/results/routing-demo.json").read_text())
print("first choice repeated, % ± (at this load)")
for index in (0, 1, 3):
    row = []
    for domain, of_domain in record["domains"].items():
        found = of_domain["layers"][index]["repeat_first"]
        half = 50 * (found["high"] - found["low"])
        row.append(f"{domain} {100 * found['share']:.1f} ± {half:.1f} ({100 * found['by_load']:.1f})")
    print(f"layer {index}: " + "   ".join(row))
of_first = {domain: np.array(of["layers"][0]["first"]["share"]) for domain, of in record["domains"].items()}
most = np.argmax(of_first["code"] - of_first["prose"])
print(f"layer 0, expert {most}: first choice of", {domain: f"{p[most]:.0%}" for domain, p in of_first.items()})
assert record["chance"]["first"] == 1 / 8

# %%
# The same picture: code repeats far above chance, English, once the load is counted in, clearly only in the last layer,
# and loads differ between code and English. The larger model has an expert that is the first choice of a quarter or
# more of code and of less than a tenth of the rest. Whether that is the topic or the spaces, you know how to ask; for
# any run and any text, ``tinymoe analyze RUN FILE ...`` writes these figures and a page in which each token shows its
# experts.
#
# Broken on purpose
# -----------------
# **1. The wrong chance.** Tokens that are drawn independently, by construction, with the load of layer 0 made a little
# less even. Held against 12.5 % it looks like a discovery, at any number of tokens:
uneven = np.array([0.30, 0.20, 0.15, 0.10, 0.10, 0.05, 0.05, 0.05])
drawn = rng.choice(E, size=(50_000, 1), p=uneven)
seen = repeats(drawn, np.zeros(len(drawn)))[0].mean()
print(f"independent tokens repeat {seen:.1%}; evenly 12.5 %, at their load {routing.repetition_by_load(drawn, E):.1%}")
assert seen > 0.16
assert abs(seen - (uneven**2).sum()) < 0.01

# %%
# **2. Intervals of independent tokens.** Deal the documents of code into two halves, and compare each expert's share in
# both. If tokens were independent, the halves would differ by more than 1.96 standard errors for one expert in twenty,
# 1.2 of 24. Over 200 deals:
code, misses = texts["code"], []
for _ in range(200):
    dealt = np.unique(code.document)
    half = np.isin(code.document, rng.permutation(dealt)[: len(dealt) // 2])
    for first in code.experts[:, :, 0]:
        p, error = share(first), np.sqrt(1 / half.sum() + 1 / (~half).sum())
        misses.append(abs(share(first[half]) - share(first[~half])) > 1.96 * error * np.sqrt(p * (1 - p)))
missed = L * np.sum(misses, axis=1).mean()
print(f"{missed:.1f} of {L * E} experts differ 'significantly' between two halves of the same kind of text")
assert missed > 2 * 0.05 * L * E

# %%
# Remember
# --------
# * No number without its chance level: 1/E and :math:`1 - \binom{E-k}{k}/\binom{E}{k}` for an even load, and the level
#   at the layer's own load beside it. A shuffle gives it without algebra.
# * In this model a byte has its expert in layer 0; deeper, context counts. Texts differ in load because they differ in
#   bytes; no expert belongs to a text.
# * Neighbours with the same first choice were mostly the same byte twice. Ask what else two things have in common.
# * Tokens are not independent observations; documents nearly are.
#
# **Ask yourself.** (a) Why must no pair reach over the end of a document? (b) Expert 3 of one run likes commas. What
# does expert 3 of another seed like? (c) The Switch loss asks for an even load. Does it forbid an expert for code? (d)
# With k = E, how often do neighbours have an expert in common? (e) Why is chance for either of two not simply twice
# 12.5 %?
#
# Exercises
# ---------
# 1. What is chance for 16 experts with top-4, and 64 with top-6? Derive it and check it by drawing sets.
# 2. Find choices of two experts with an even load whose tokens agree *less* often than 46.4 % by chance.
# 3. "In layer 0 the byte decides" is a correlation. Test it: shuffle the bytes inside each window, let the model read
#    that, and count which bytes kept their first choice.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) the last byte of one and the first of the next are neighbours only in memory; (b) nothing in
# particular: experts can be renumbered without any change, so numbers mean nothing across runs; (c) no, it sees the
# whole batch, and an expert that all code visits and nothing else
# is balanced if code is k/E, a quarter, of the batch; (d) always; (e) two tokens have 4
# pairs of choices, each equal with probability 1/8, and both choices may agree at once: 4/8 counts such cases twice.
#
# 1. :math:`1 - \binom{12}{4}/\binom{16}{4} = 72.8\,\%` and :math:`1 - \binom{58}{6}/\binom{64}{6} = 46.0\,\%`:
for experts, chosen in ((16, 4), (64, 6)):
    a, b = (rng.random((20_000, experts)).argsort(axis=1)[:, :chosen] for _ in range(2))
    drawn = (a[:, :, None] == b[:, None, :]).any(axis=(1, 2)).mean()
    print(f"{chosen} of {experts}: {routing.repetition_by_chance(experts, chosen):.3f}, drawn {drawn:.3f}")
    assert abs(drawn - routing.repetition_by_chance(experts, chosen)) < 0.02

# %%
# 2. Four fixed pairs, each chosen by a quarter of the tokens. Every expert has an eighth of all choices, and two tokens
#    agree with probability 1/4. Even load does not fix this chance for k > 1, as it does for k = 1:
pairs = np.tile(np.arange(E).reshape(-1, 2), (100, 1))  # (400, 2)
print("chance with four fixed pairs:", routing.repetition_by_load(pairs, E))
assert (np.bincount(pairs.ravel()) == 100).all()
assert np.isclose(routing.repetition_by_load(pairs, E), 0.25)

# %%
# 3. Most first choices of layer 0 survive without their context, and far fewer of the deeper ones. Beside it how often
#    the same byte has the same first choice somewhere else in the text as it is: what survives shuffling is about what
#    the byte decides, and no more.
windows = texts["prose"].tokens[: 40 * 128].reshape(40, 128)
order = rng.permuted(np.tile(np.arange(128), (40, 1)), axis=1)
before, after = model.routing(windows), model.routing(np.take_along_axis(windows, order, axis=1))
for layer in range(L):
    was, now = (of[layer][1][:, 0].reshape(40, 128) for of in (before, after))
    kept = (np.take_along_axis(was, order, axis=1) == now).mean()
    elsewhere = np.zeros_like(was)
    for byte in np.unique(windows):
        elsewhere[windows == byte] = rng.permutation(was[windows == byte])
    print(f"layer {layer}: {kept:.0%} of bytes kept their first choice; elsewhere it is the same for", end=" ")
    print(f"{(was == elsewhere).mean():.0%}")
    if layer == 0:
        of_first_layer = kept
assert of_first_layer > kept + 0.1

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 12 </lessons/lesson_12_dense>` asks what all of this is worth: a mixture beside dense models of
# the same size, by two meanings of "same".
