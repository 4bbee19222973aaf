"""Where XLA's ROCm plugin (the wheel jax-rocm7-pjrt) is, and whether it fits this JAX.

The folder that the environment variable MUD_PUPPY_ROCM names is looked at first, then the Python
environment. Without an AMD card the plugin belongs in a folder of its own, for JAX prints a
traceback at start when it finds the plugin and no card.
"""

import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

from mud_puppy.errors import UserError

VARIABLE = "MUD_PUPPY_ROCM"
LIBRARY = "jax_plugins/xla_rocm*/xla_rocm_plugin.so"


def find(folder: Path | None = None) -> Path:
    """The plugin's shared library, in `folder`, else in $MUD_PUPPY_ROCM, else where Python looks.

    Raises UserError, with the command that installs it, where there is none or one for another JAX.
    """
    named = folder or os.environ.get(VARIABLE)
    places = [Path(named).expanduser()] if named else [Path(p) for p in sys.path if p]
    found = next((library for place in places for library in place.glob(LIBRARY)), None)
    if found is None:
        where = f"in {named}" if named else "in this Python environment"
        raise UserError(f"XLA's ROCm plugin is not {where}. Install it: {command(named)}")
    _check_version(found.parents[2], named)
    return found


def _check_version(place: Path, named: str | Path | None) -> None:
    infos = [re.search(r"-([\d.]+)\.dist-info$", p.name) for p in place.glob("jax_rocm*_pjrt-*")]
    versions = {m[1] for m in infos if m}
    if versions and version("jax") not in versions:
        raise UserError(
            f"the ROCm plugin in {place} is for jax {', '.join(sorted(versions))}, and jax "
            f"{version('jax')} runs here. Install its own in a folder of its own: "
            f"{command(named)}"
        )


def command(named: str | Path | None) -> str:
    """What installs the plugin of this JAX, in the folder `named` or one of its own."""
    folder = shlex.quote(str(named or "rocm-plugin"))
    install = f"pip install --no-deps --target {folder} jax-rocm7-pjrt=={version('jax')}"
    return install if named else f"{install}, then set {VARIABLE}={folder}"
