"""TRL says at import that its experimental trainers may change; the version is pinned."""

import os

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
