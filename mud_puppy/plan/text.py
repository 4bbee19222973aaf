"""A plan as lines for people, and as JSON values."""

from importlib.metadata import version
from typing import Any

from mud_puppy.plan.answer import MOST_ROWS, Plan
from mud_puppy.plan.suggest import Changes, Suggestion

GIB = 2**30


def values(plan: Plan) -> dict[str, Any]:
    """What `mud-puppy plan --json` prints; GiB and FLOP are of each device and of all."""
    place, built = plan.place, plan.built
    return {
        "target": place.name,
        "devices": place.devices,
        "model": plan.model,
        "method": plan.config.method,
        "batch_size": plan.rows,
        "seq_length": plan.length,
        "fits": plan.fits,
        "peak_gib": _gib(built.needed),
        "limit_gib": _gib(place.limit),
        "memory_gib": _gib(place.memory),
        "parts_gib": {name: _gib(n) for name, n in plan.parts.items()},
        "gradients_gib": _gib(built.held.gradients),
        "host_gib": _gib(built.host),
        "max_batch_size": plan.max_batch_size,
        "max_seq_length": plan.max_seq_length,
        "max_seq_length_offloaded": plan.max_seq_length_offloaded,
        "model_max_seq_length": plan.model_positions,
        "flops": built.flops,
        "bytes": built.moved,
        "roofline_tokens_per_s": plan.roofline_tokens_per_s,
        "suggestions": [
            {
                "changes": s.changes,
                "devices": s.devices,
                "peak_gib": _gib(s.needed),
                "why": s.why,
            }
            for s in plan.suggestions
        ],
        "jax": version("jax"),
    }


def _gib(n: int) -> float:
    return round(n / GIB, 3)


def text(plan: Plan) -> str:
    """The answer on a page."""
    place, built = plan.place, plan.built
    cards = f"{place.devices} x {place.name}" if place.devices > 1 else place.name
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    each = " on each" if place.devices > 1 else ""
    lines = [
        f"{plan.model}, {plan.config.method}, {plan.rows} x {plan.length} tokens, on {cards}",
        f"{verdict}: needs {built.needed / GIB:.2f} GiB{each}, "
        f"{place.limit / GIB:.2f} of {place.memory / GIB:.2f} GiB may be used",
        "",
        *(f"  {name:12} {n / GIB:8.2f} GiB{_note(plan, name)}" for name, n in plan.parts.items()),
    ]
    if built.host:
        lines.append(f"  {'host memory':12} {built.host / GIB:8.2f} GiB (pinned)")
    if plan.searched:
        lines += ["", *_limits(plan)]
    lines += ["", *_floor(plan)]
    if not plan.fits:
        lines += ["", *_ideas(plan)]
    return "\n".join(lines)


def _note(plan: Plan, name: str) -> str:
    gradients = plan.built.held.gradients
    return f" (gradients: {gradients / GIB:.2f})" if name == "temporaries" and gradients else ""


def _limits(plan: Plan) -> list[str]:
    each, rows = plan.place.devices, plan.max_batch_size
    row = "1 row" if each == 1 else f"{each} rows, one a card"
    most = f"{rows} or more" if rows >= MOST_ROWS // each * each else f"{rows or 'none fits'}"
    lines = [
        f"largest batch of {plan.length} tokens a row: {most}",
        f"longest sequence ({row}): {_length(plan, plan.max_seq_length)}",
    ]
    if plan.stretch:
        longer = _length(plan, plan.max_seq_length_offloaded)
        lines.append(f"  with {_keys(plan.stretch)}: {longer}")
    return lines


def _length(plan: Plan, longest: int) -> str:
    own = ", all that the model has positions for" if longest == plan.model_positions else ""
    return f"{longest or 'none fits'}{own}"


def _floor(plan: Plan) -> list[str]:
    built = plan.built
    work = (
        f"a step: {built.flops / 1e12:,.1f} TFLOP of products, at least {built.moved / 1e9:.1f} GB"
    )
    if plan.roofline_tokens_per_s is None or plan.floor_s is None:
        return [work, f"no bound on the speed: the peaks of {plan.place.name} are not known here"]
    return [
        work,
        f"bound: no step is shorter than {plan.floor_s * 1e3:,.0f} ms, no more than "
        f"{plan.roofline_tokens_per_s:,.0f} tokens/s (the vendor's peaks, a row of one example; "
        "nothing was measured)",
    ]


def _ideas(plan: Plan) -> list[str]:
    if not plan.suggestions:
        return ["no change that a plan knows makes it fit: take a smaller model or more memory"]
    return ["what makes it fit, each compiled:", *(_idea(s, plan) for s in plan.suggestions)]


def _idea(idea: Suggestion, plan: Plan) -> str:
    more = f", --devices {idea.devices}" if idea.devices != plan.place.devices else ""
    return f"  {_keys(idea.changes)}{more}: {idea.needed / GIB:.2f} GiB ({idea.why})"


def _keys(changes: Changes) -> str:
    return ", ".join(f"{key} {_yaml(value)}" for key, value in changes.items())


def _yaml(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
