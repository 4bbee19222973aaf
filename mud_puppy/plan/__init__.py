"""Will it fit, and how fast can it be at best: a run's own step, compiled for a card that need not
be here.

    from mud_puppy.plan import plan

    found = plan("configs/qlora.yaml", target="7900xtx")
    found.fits, found.max_seq_length, found.suggestions

Weights are neither loaded nor downloaded: a model's config.json is enough, and for the shapes of
`plan.shapes` not even that. See docs/plan.md for what the numbers are and how true they were.
"""

from mud_puppy.plan.answer import Plan, plan
from mud_puppy.plan.text import text, values

__all__ = ["Plan", "plan", "text", "values"]
