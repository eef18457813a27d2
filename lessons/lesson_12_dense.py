r"""
Lesson 12 · Mixture against dense: the same FLOPs, the same memory, not both
============================================================================

**The question.** What do experts buy? A mixture has two sizes, the parameters that a token uses and those that have to
be stored, and a dense model has one. So there are two dense models to compare with, and a claim about "a model of the
same size" is worth nothing before it says which.

We first show that a mixture *is* a dense block with most of it switched off for each token, which says what to expect.
Then we count: parameters, FLOPs, bytes. Then the measurements: the record of an experiment with three seeds, and a race
of micro models before your eyes, which is there mostly to show what a race so short cannot tell.

**You need** the layer of :doc:`lesson 6 </lessons/lesson_06_moe_layer>` and a training run from
:doc:`lesson 9 </lessons/lesson_09_training>`. Read, not made: ``docs/results/dense.json``, which
``tinymoe experiment dense`` writes.
"""

# %%
# A dense block is a sum of experts
# ---------------------------------
# A dense SwiGLU block with E·F hidden units has matrices of E·F rows. Cut them into E pieces of F rows. The hidden
# units of a piece depend on its own rows of w1 and w3 alone, and the output is a sum over hidden units, so
#
# .. math:: \mathrm{dense}(x) = W_2 \bigl( \mathrm{silu}(W_1 x) \odot W_3 x \bigr)
#           = \sum_{e=1}^{E} W_2^{(e)} \bigl( \mathrm{silu}(W_1^{(e)} x) \odot W_3^{(e)} x \bigr)
#           = \sum_{e=1}^{E} \mathrm{expert}_e(x).
#
# A mixture is the same sum with all but k terms left out, token by token, and weights on the rest. With k = E and equal
# logits nothing is left out and every weight is 1/E.
import dataclasses
import json
import math
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import tinymoe
from tinymoe.reference import ffn, ffn_backward, moe, moe_backward

LINE = "def add(a, b): return a + b"
tokens = np.frombuffer(LINE.encode(), np.uint8)
N, D, E, k, F = len(tokens), 16, 8, 2, 12

rng = np.random.default_rng(0)
x = rng.standard_normal((256, D))[tokens]  # (N, D)
w1, w3 = (rng.standard_normal((E, F, D)) / D**0.5 for _ in range(2))  # (E, F, D)
w2 = rng.standard_normal((E, D, F)) / F**0.5  # (E, D, F)
stacked = w1.reshape(E * F, D), w2.transpose(1, 0, 2).reshape(D, E * F), w3.reshape(E * F, D)

dense, dense_saved = ffn(x, *stacked)  # (N, D)
of_experts = sum(ffn(x, w1[e], w2[e], w3[e])[0] for e in range(E))
all_of_them, all_saved = moe(x, np.zeros((E, D)), w1, w2, w3, top_k=E)
np.testing.assert_allclose(of_experts, dense, rtol=1e-9, atol=1e-12)
np.testing.assert_allclose(E * all_of_them, dense, rtol=1e-9, atol=1e-12)
print("dense block", [w.shape for w in stacked], "= sum of", E, "experts", w1.shape[1:])

# %%
# Backwards, too: the gradient of a sum is the sum of the gradients, so a piece learns in the dense block what it would
# learn as an expert that every token visits. By finite differences for one number of x, and by the mixture's backward
# for all:
goal = rng.standard_normal((N, D))
dx, *_ = ffn_backward(dense - goal, dense_saved)  # of the loss ½ Σ (dense − goal)²
dx_mixture, *_ = moe_backward(E * (dense - goal), None, all_saved)  # dense is E times the mixture
np.testing.assert_allclose(dx_mixture, dx, rtol=1e-9, atol=1e-10)

h, losses = 1e-6, []
for step in (h, -h):
    moved = x.copy()
    moved[3, 5] += step
    losses.append(0.5 * ((ffn(moved, *stacked)[0] - goal) ** 2).sum())
print(f"dx[3, 5] = {dx[3, 5]:.7f}, by finite differences {(losses[0] - losses[1]) / (2 * h):.7f}")
assert abs(dx[3, 5] - (losses[0] - losses[1]) / (2 * h)) < 1e-5 * max(1, abs(dx[3, 5]))

# %%
# This places the three models before anything is trained:
#
# * The dense block of **k·F** units costs a token what the mixture costs. The mixture can choose *which* k·F units it
#   uses, so it should be no worse, if its router learns and its experts get enough tokens each.
# * The dense block of **E·F** units stores what the mixture stores, and uses all of it for each token. But for
#   its weights, which depend on the token, the mixture is a restriction of it. That bounds what it can express, not
#   what it has learned after so many steps; still, one expects it to be no better. It is there to win per FLOP.
#
# Counting
# --------
# The sizes are those of the experiment: D = 64, 3 layers, 8 experts of F = 128, top-2. Per layer the feed-forward part
# has 3·D·F parameters an expert, and the gate D·E. A token multiplies with each weight that it uses once forward,
# 2 FLOP, and twice as much backward; attention's scores come on top, the same for all three.
from tinymoe.experiments import dense as experiment
from tinymoe.scale import footprint

small = tinymoe.MixtralConfig.tiny(n_layers=3)
configs = {name: dataclasses.replace(small, **changes) for name, changes in experiment.shapes(small).items()}
context = 128


def by_hand(config):
    D, L, V, F = config.dim, config.n_layers, config.vocab_size, config.hidden_dim
    experts, used = config.num_experts or 1, config.top_k_experts or 1  # a dense block is one expert, always used
    attention = 2 * D * config.head_dim * (config.n_heads + config.n_kv_heads)
    rest = 2 * V * D + D + L * (attention + 2 * D + D * config.num_experts)
    multiplied = V * D + L * (attention + D * config.num_experts + used * 3 * D * F)  # the head, not the embedding
    scores = 4 * L * config.n_heads * config.head_dim * (context + 1) / 2  # of the average token
    return rest + L * experts * 3 * D * F, rest + L * used * 3 * D * F, 3 * (2 * multiplied + scores)


print(f"{'':<24}{'parameters':>12}{'active':>12}{'training FLOP a token':>24}")
for name, config in configs.items():
    total, active, flop = by_hand(config)
    print(f"{name:<24}{total:>12,}{active:>12,}{flop:>24,.0f}")
    assert total == config.count_parameters()
    assert active == config.count_active_parameters()
    assert math.isclose(flop, footprint.training_flops(config, context))

mixture, as_active, as_total = configs.values()
router = small.n_layers * small.dim * small.num_experts
assert mixture.count_parameters() - as_total.count_parameters() == router
assert mixture.count_active_parameters() - as_active.count_parameters() == router
print(f"the mixture has {router:,} parameters more than either: its routers")

# %%
# The same for the paper's model. "8x7B" suggests 56 billion, but only the experts are there eight times. What a token
# computes follows the active parameters, what a machine must hold follows the total:
large = tinymoe.MixtralConfig.mixtral_8x7b()
for name, changes in experiment.shapes(large).items():
    config = dataclasses.replace(large, **changes)
    total, active = config.count_parameters() / 1e9, config.count_active_parameters() / 1e9
    stored = footprint.weight_bytes(config, "bf16") / 1e9
    print(f"{name:<24}{total:6.2f} B, active {active:5.2f} B, {stored:5.1f} GB in bfloat16")
assert large.count_parameters() == 46_702_792_704
assert large.count_active_parameters() == 12_879_925_248

# %%
# What a batch changes
# --------------------
# Decoding reads weights, and a batch shares what it reads. One sequence makes a mixture read k experts of a layer. B
# sequences together touch :math:`E (1 - (1 - k/E)^B)` of them, if they choose independently and evenly: soon all. From
# there on the mixture reads like the large dense model and computes like the small one: fewer FLOPs for each byte read,
# so it takes a larger batch than a dense model before arithmetic, not memory, is the limit. At batch 1 it reads and
# computes like the small one. Its memory is the large one's at any batch.
batches = np.array([1, 2, 4, 8, 16, 32, 64, 128])
shapes = {name: dataclasses.replace(large, **changes) for name, changes in experiment.shapes(large).items()}
figure, axes = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for name, config in shapes.items():
    read = [footprint.decode_bytes(config, int(batch), 1024, "bf16") / 1e9 for batch in batches]
    axes[0].plot(batches, read, "o-", markersize=4, label=name)
    axes[1].plot(batches, batches * footprint.decode_flops(config, 1024) / 1e9, "o-", markersize=4, label=name)
for axis, label in zip(axes, ("GB read in a decoding step", "GFLOP of a decoding step")):
    axis.set(xlabel="sequences in the batch", ylabel=label)
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=8)
axes[1].set_yscale("log")
figure.suptitle("8x7B, counted: in a large batch the mixture reads like the large model and computes like the small")
plt.show()
print("experts touched:", {int(batch): round(footprint.experts_touched(large, int(batch)), 1) for batch in batches})

# %%
# The record
# ----------
# The three models of the count above, on the same text, the same batches, the same number of steps, with three seeds.
# Two numbers decide what may be said. The **margin** is by how much the mixture's last held-out loss is below a dense
# model's, seed by seed. The **spread** is the largest difference between two seeds of one and the same model. A margin
# below the spread shows nothing.
repository = Path(tinymoe.__file__).parents[1]
record = json.loads((repository / "docs/results/dense.json").read_text())
numbers = record["numbers"]
print(record["command"], "of", record["machine"]["date"])
for name, losses in numbers["margins"]["last_losses"].items():
    size = numbers["compared"][name][0]
    print(f"{name:<24}{size['parameters']:>10,} parameters, {size['active']:>9,} active, losses", np.round(losses, 4))
spread = numbers["margins"]["spread"]


def verdict(below, spread):
    mean, error = np.mean(below), np.std(below, ddof=min(1, len(below) - 1)) / len(below) ** 0.5
    beyond = all(abs(margin) > spread for margin in below) and len({margin > 0 for margin in below}) == 1
    judged = "every seed beyond the spread" if beyond else "not every seed beyond the spread"
    return f"{'better' if mean > 0 else 'worse'} by {abs(mean):.4f} ± {error:.4f}; {judged}: {np.round(below, 4)}"


print(f"spread between seeds of one model: {spread:.4f}")
for name, below in numbers["margins"]["below"].items():
    print(f"the mixture is, against {name}: {verdict(below, spread)}")

# %%
# The first prediction holds in sign: the mixture is below the dense model of as many active parameters with all three
# seeds, but one margin, 0.022, is less than two seeds of one model may differ. The second is undecided: against the
# dense model of as many in all it is ahead with two seeds of three. Two million bytes (1000 steps of 16 × 128) are few
# for 660,000 parameters, and a long run may favour the large model.
#
# A margin is of two runs with the same seed, so with the same batches, in the hope that what the batches do to both
# drops out of it. Here it does not: the margins differ by up to 0.05 between seeds, the losses of one model by at most
# 0.03. The ± is the standard error of the mean, from three numbers, so it is known only roughly. Nor is a margin a
# constant: it has a history.
steps = [line["step"] for line in numbers["compared"]["mixture"][0]["curve"]]
of_step = {  # (seeds, steps)
    name: np.array([[line["val_loss"] for line in run["curve"]] for run in runs])
    for name, runs in numbers["compared"].items()
}
shown = [0, len(steps) // 2 - 1, -1]
print("margin of the mixture, mean over seeds, after step " + "".join(f"{steps[i]:>8}" for i in shown))
for name in list(of_step)[1:]:
    history = (of_step[name] - of_step["mixture"]).mean(axis=0)
    print(f"{'against ' + name:<50} " + "".join(f"{margin:+8.3f}" for margin in history[shown]))

# %%
# Against the large dense model it even changes its sign: the mixture begins behind, and is ahead from step 250 on.
#
# The same runs look different over other axes. Over steps the dense model of all parameters has computed more. Over
# FLOPs it is charged for that. Over seconds everything is charged that a FLOP count forgets: small matrix products,
# sorting, memory. The record's machine was shared, so of its times only the ratios are worth printing:
seconds = numbers["seconds"]
for name, of_model in seconds.items():
    flop = numbers["compared"][name][0]["curve"][-1]["flop"] / numbers["compared"]["mixture"][0]["curve"][-1]["flop"]
    ratios = (of_model[what] / seconds["mixture"][what] for what in ("step", "token"))
    print(f"{name:<24}FLOP {flop:4.2f}, time of a step {next(ratios):4.2f}, of a token at batch 1 {next(ratios):4.2f}")

figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained", sharey=True)
for colour, (name, runs) in enumerate(numbers["compared"].items()):
    for number, run in enumerate(runs):
        steps, flops, losses = (np.array([line[key] for line in run["curve"]]) for key in ("step", "flop", "val_loss"))
        relative = steps * seconds[name]["step"] / seconds["mixture"]["step"]
        for axis, xs in zip(axes, (steps, flops, relative)):
            axis.plot(xs, losses, color=f"C{colour}", linewidth=1, label=name if number == 0 else None)
for axis, label in zip(axes, ("steps", "FLOP", "time, in steps of the mixture")):
    axis.set_xlabel(label)
axes[0].set_ylabel("held-out loss, nats per byte")
axes[0].legend(fontsize=7)
figure.suptitle("The same runs by step, by FLOP and by time: the order of the three depends on the axis")
plt.show()

# %%
# Mind that the rate falls along a cosine over each run's own 1000 steps. A run that is cut at a third has not been
# annealed, so the two right-hand pictures are unfair to whoever is still on the way; a fair comparison trains each
# model with a schedule for each budget.
#
# **Where dense should win:**
#
# * *Memory is what costs.* A mixture that fills a machine has to beat the dense model that fills it; here neither is
#   ahead. At batch 1 it leaves three quarters of what it stores unread.
# * *Time is what costs.* A FLOP of the mixture costs more: a step takes 1.17 times as long as the small dense model's,
#   for 1.01 times the FLOPs, and a decoded token 1.49 times. Experts cut one large product into many small ones.
# * Routing has overhead, and more when several experts run on one device: "more suitable for batched workloads", says
#   the paper.
#
# What its shape is worth
# -----------------------
# The record's ablations change one thing each, with one seed. So the spread over seeds is all that they can be held
# against, and a difference smaller than that is no finding:
plain = numbers["compared"]["mixture"][0]["curve"][-1]["val_loss"]
print(f"{'':<36}{'loss':>8}{'difference':>12}{'parameters':>13}{'active':>11}")
for name, run in numbers["ablations"].items():
    loss = run["curve"][-1]["val_loss"]
    mark = "" if abs(loss - plain) > spread else "  within the spread"
    print(f"{name:<36}{loss:8.4f}{loss - plain:+12.4f}{run['parameters']:13,}{run['active']:11,}{mark}")

names = list(numbers["ablations"])
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
differences = [numbers["ablations"][name]["curve"][-1]["val_loss"] - plain for name in names]
axes.axvspan(-spread, spread, color="0.9", label="spread between seeds")
axes.barh(names, differences, color=["C2" if d < 0 else "C3" for d in differences])
axes.axvline(0, color="black", linewidth=0.8)
axes.invert_yaxis()
axes.set_xlabel("held-out loss beside the plain mixture of 8 experts, top-2; left is better")
axes.legend(fontsize=8)
axes.set_title("Other shapes of the mixture: what stays in the grey band is no finding", fontsize=10)
plt.show()

# %%
# Mind what is not equal in these lines: top-4 has more active parameters, 64 experts are more to store. Two pairs are
# equal in both sizes, but for the router: twice the experts of half the size, and half of twice the size. Top-1 is far
# behind for a reason of its own: a renormalised weight of one expert is always 1, so its router learns from the balance
# loss alone. The line of half the experts is top-1 as well, and shows the same. 16 and 32 experts are better than 8; of
# 64, beyond the band by 0.001, one seed says nothing.
#
# A race before your eyes
# -----------------------
# Micro models, 80 steps, three seeds each. It takes seconds, and that is its trouble.
from tinymoe.corpora import standard_library
from tinymoe.experiments.learning import learn, micro
from tinymoe.tokenizer import ByteTokenizer
from tinymoe.training import Options, evaluate, sample_windows

corpus, tokenizer = standard_library(), ByteTokenizer()
text = corpus.train_tokens(tokenizer)
windows = sample_windows(corpus.held_out_tokens(tokenizer), 64, most=64)
raced = {}
for name, changes in experiment.shapes(micro()).items():
    raced[name] = []
    for seed in range(3):
        options = Options(steps=80, batch_size=8, seq_len=64, warmup=8, learning_rate=1e-2, seed=seed)
        model = learn(micro(**changes), text, options)
        raced[name].append({"curve": [{"val_loss": evaluate(model, windows)[0]}]})
race = experiment.margins(raced)
for name, losses in race["last_losses"].items():
    print(f"{name:<24} losses", np.round(losses, 3))
print(f"spread {race['spread']:.3f}")
for name, below in race["below"].items():
    print(f"the mixture is, against {name}: {verdict(below, race['spread'])}")

# %%
# **What this can show:** that all three learn, how far two seeds of one model differ, and how each *begins*. On the
# machine where this was written the mixture began behind both others with most seeds: perhaps because an expert sees a
# quarter of the tokens that a dense block sees, and the router has to learn first. **What it cannot show:** how it
# ends. Micro models after 80 steps are one point of a history whose later part is in the record, and may well have the
# opposite sign. Anyone who wants to show that mixtures do not work needs ten seconds.
#
# Broken on purpose
# -----------------
# **1. The best of n runs.** A table with one line per model often shows each model's best run, and the authors' own had
# more of them. What that alone is worth, for one and the same model, in standard deviations between its seeds:
for n in (1, 3, 10):
    best, one = rng.standard_normal((100_000, n)).min(axis=1), rng.standard_normal(100_000)
    print(f"the best of {n:>2} runs is below a single run by {(one - best).mean():5.2f} on average")
assert (one - best).mean() > 1.4

# %%
# **2. "The same size", unsaid.** Here is one table, true in each line, that lets the mixture win or lose as one likes:
parameters = {name: config.count_parameters() for name, config in shapes.items()}
flops = {name: footprint.decode_flops(config, 1024) for name, config in shapes.items()}
for name in list(shapes)[1:]:
    print(f"the mixture has {parameters['mixture'] / parameters[name]:5.2f} x the parameters and ", end="")
    print(f"{flops['mixture'] / flops[name]:5.2f} x the FLOP a token of: {name}")

# %%
# **3. Counting FLOPs of all experts.** Code that runs every expert on every token and multiplies with weights, most of
# them zero, gives the right numbers. It is the dense model's bill for the mixture's loss:
everything = dataclasses.replace(small, top_k_experts=small.num_experts)
wasted = footprint.training_flops(everything, context) / footprint.training_flops(small, context)
in_experts = small.num_experts / small.top_k_experts
print(f"{in_experts:.0f} times the FLOP in the experts, {wasted:.2f} times in all")
assert in_experts == 4

# %%
# Remember
# --------
# * A dense block of E·F units is the sum of E experts. A mixture switches off all but k of them, token by token.
# * Compute follows active parameters, memory follows the total. Say which of the two is held equal.
# * A margin counts beside the spread over seeds; with one seed there is no spread, and no finding.
# * Dense has the advantage where memory or time per FLOP is what costs; a mixture wins per FLOP.
#
# **Ask yourself.** (a) Why can a mixture not express more than the dense model of E·F units, but for its weights and
# gate? (b) Why are margins taken seed by seed? (c) What does a decoding step of 64 sequences
# read, beside both dense models? (d) An expert of eight, top-2, sees how many of a batch's tokens? (e) A colleague
# shows a mixture of 47 B that beats a dense model of 13 B. What do you ask?
#
# Exercises
# ---------
# 1. Which hidden sizes make dense models of as many active, and in all as many, parameters as 8x7B? How far off are
#    they, and why?
# 2. Twice the experts of half the size: count parameters, FLOPs and sets of experts that a token can choose.
# 3. From which batch on does a decoding step of 8x7B touch 99 % of the experts? Derive it and check it by drawing.

# %%
# .. raw:: html
#
#    <details class="answers"><summary>Answers</summary>

# %%
# Ask yourself: (a) each of its outputs is a weighted sum of some of the terms whose sum the dense block is; the weights
# depend on the token, which the dense block has no means for; (b) the seed fixes the batches, and whatever they do to
# both drops out (in this record that is little); (c) as many weights as the large one, 3.6 times those of the small
# one, shared by 64; (d) a quarter, k/E; (e) which size was held equal, how many seeds, and what the dense model of 47
# B does.
#
# 1. F = 2 · 14336 = 28672 and F = 8 · 14336 = 114688, and both are off by the routers, 4096 · 8 in each of 32 layers:
for changes, count in zip(list(experiment.shapes(large).values())[1:], ("count_active_parameters", "count_parameters")):
    config = dataclasses.replace(large, **changes)
    print(config.hidden_dim, f"{getattr(large, count)() - config.count_parameters():,}")
    assert getattr(large, count)() - config.count_parameters() == 32 * 4096 * 8

# %%
# 2. The experts' parameters and FLOPs stay, the gate doubles, and 28 sets of experts become 1820:
finer = dataclasses.replace(small, **experiment.ablations(small)["twice the experts, half the size"])
more = finer.count_parameters() - small.count_parameters()
print(f"{finer.num_experts} experts of {finer.hidden_dim}, top-{finer.top_k_experts}: {more:+,} parameters")
assert finer.count_parameters() - small.count_parameters() == router
assert finer.count_active_parameters() - small.count_active_parameters() == router
assert (math.comb(8, 2), math.comb(16, 4)) == (28, 1820)

# %%
# 3. :math:`(1 - k/E)^B \le 0.01`, so :math:`B \ge \ln 0.01 / \ln 0.75 = 16.01`: from 17 on.
needed = math.ceil(math.log(0.01) / math.log(1 - 2 / 8))
touched = statistics.mean(len(np.unique(rng.random((needed, 8)).argsort(axis=1)[:, :2])) for _ in range(2000))
print(f"batch {needed}: {touched:.3f} of 8 by drawing, {footprint.experts_touched(large, needed):.3f} by the formula")
assert needed == 17
assert abs(touched - footprint.experts_touched(large, needed)) < 0.05

# %%
# .. raw:: html
#
#    </details>

# %%
# **Next:** :doc:`lesson 13 </lessons/lesson_13_cuda_model>` leaves NumPy: how a GPU runs a kernel, shown on a CPU.
