"""Tools that judge code for AMD cards without one: named cards, compiling, reading kernel binaries.

`targets` names the cards; `compile` runs XLA's ROCm compiler in a worker process that has no
device; `binary` and `instructions` read what it made; `budget` judges it. Nothing of these runs on
a GPU or is imported by training. `settings` is what mud_puppy sets where there is a card, and `kfd`
lists the cards of this machine.
"""
