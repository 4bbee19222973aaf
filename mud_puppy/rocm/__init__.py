"""Tools that judge code for AMD cards without one: named cards, compiling, reading kernel binaries.

`targets` names the cards; `compile` runs XLA's ROCm compiler in a worker process that has no
device; `binary` and `instructions` read what it made; `budget` judges it. Nothing here runs on a
GPU, and nothing here is imported by training.
"""
