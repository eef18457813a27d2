"""The plan of a model as tables for a terminal of 80 columns."""

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tinymoe.scale.plan import Plan

NOTE = (
    "tokens/s: all sequences together, on the devices needed; a ceiling, as if they only read or only multiplied. "
    "Activations are not counted. Figures of GPUs are from their datasheets, those of this machine measured."
)


def render(plan: Plan) -> Group:
    """Return the plan as three tables, of parameters, memory and work, and devices, and a note."""
    return Group(_parameters(plan), _memory_and_work(plan), _devices(plan), Text(NOTE, style="dim"))


def _parameters(plan: Plan) -> Table:
    counts, config = plan.parameters, plan.config
    expert = counts.feed_forward
    parts = {
        "embedding": counts.embedding,
        "output head": counts.output_head,
        "attention": counts.attention,
        "router": counts.router,
        "experts" if config.num_experts else "feed-forward": expert,
        "norms": counts.norms,
    }
    table = _table("parameters", "each", "copies", "in all", "active per token")
    for name, part in parts.items():
        if part.total:  # tied embeddings have no output head beside them, dense models no router
            table.add_row(name, f"{part.each:,}", f"{part.copies:,}", f"{part.total:,}", f"{part.active:,}")
    table.add_section()
    table.add_row("all parts", "", "", f"{counts.total:,}", f"{counts.active:,}")
    if config.num_experts:
        table.add_row("share of all", "", "", "100.0%", f"{counts.active / counts.total:.1%}")
        shared = f"{counts.total - expert.total:,}"
        table.add_row("all but experts", "", "", shared, shared)
        table.add_row("one expert", f"{expert.each:,}", f"{config.n_layers:,}", f"{expert.each * config.n_layers:,}")
    return table


def _memory_and_work(plan: Plan) -> Table:
    E, context = plan.config.num_experts, f"{plan.context:,} tokens"
    held = plan.kv_cache_bytes // (plan.batch * plan.kv_bytes_per_token)
    window = " (the window)" if held < plan.context else ""
    weights = f"{plan.experts_touched:.3g} of {E} experts a layer" if E else "the weights"
    table = _table("memory and work", "", "")
    table.columns[2].justify = "left"
    table.add_row("weights", _si(plan.weight_bytes, "B"), plan.dtype)
    table.add_row("KV cache", _si(plan.kv_cache_bytes, "B"), f"{plan.batch:,} x {held:,} tokens{window}")
    table.add_row("  of one token", _si(plan.kv_bytes_per_token, "B"))
    table.add_row("decoding, a token", _si(plan.decode_flops, "FLOP"), f"the last of {context}")
    table.add_row("prefill, a token", _si(plan.prefill_flops, "FLOP"), f"the average of {context}")
    table.add_row("training, a token", _si(plan.training_flops, "FLOP"), "3 x the forward pass")
    table.add_row("a decoding step reads", _si(plan.decode_bytes, "B"), f"{weights}, and the KV cache")
    table.add_row(
        "  and computes", _si(plan.batch * plan.decode_flops, "FLOP"), f"{plan.decode_intensity:.3g} FLOP a byte"
    )
    return table


def _devices(plan: Plan) -> Table:
    table = _table("device", "memory", "after loading", "devices\nneeded", "largest\nbatch", "tokens/s", "bound by")
    for place in plan.placements:
        table.add_row(
            place.device.name,
            _si(place.device.memory_bytes, "B"),
            _si(abs(place.free_bytes), "B") + (" free" if place.fits else " short"),
            f"{place.devices_needed:,}",
            f"{place.largest_batch:,}",
            _si(place.tokens_per_second, ""),
            place.bound_by,
            style="green" if place.fits else None,
        )
    return table


def _table(*columns: str) -> Table:
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    table.columns[0].no_wrap = True
    return table


def _si(value: float, unit: str) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5:
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    return f"{value:.3g} E{unit}"
