"""Findings of packages: JAX's plugin, ROCm, and whether their versions go together."""

import re

from mud_puppy.doctor.facts import Facts
from mud_puppy.doctor.finding import Finding
from mud_puppy.rocm.targets import ARCHITECTURES

EXTRAS = {"rocm": "rocm7-local", "cuda": "cuda13"}
ROCM_GUIDE = "https://rocm.docs.amd.com/projects/install-on-linux/en/latest/"


def plugins(facts: Facts) -> list[Finding]:
    """JAX's plugin for the card at hand: there, whole, and of JAX's version."""
    found = []
    for maker, there in (("rocm", facts.amd_gpus), ("cuda", facts.nvidia)):
        parts = {k: v for k, v in facts.versions.items() if k.startswith(f"jax_{maker}")}
        if there and not parts:
            card = "AMD" if maker == "rocm" else "NVIDIA"
            what = f"There is an {card} card, and JAX's plugin for it is not installed."
            found.append(Finding("plugin-missing", what, _jax(facts), _extra(facts, maker)))
        if parts:
            found += _parts(facts, parts)
    return found


def _parts(facts: Facts, parts: dict[str, str]) -> list[Finding]:
    generations = {re.sub("_(plugin|pjrt)$", "", name) for name in parts}
    whole = {f"{g}_{part}" for g in generations for part in ("plugin", "pjrt")}
    jax = facts.versions.get("jaxlib") or facts.versions.get("jax", "")
    fix = f"pip install {' '.join(f'{_dashed(name)}=={_release(jax)}' for name in sorted(whole))}"
    where = ", ".join(f"{_dashed(k)} {v}" for k, v in sorted(parts.items()))
    if missing := sorted(whole - set(parts)):
        what = f"JAX's plugin is not whole: {', '.join(map(_dashed, missing))} is missing."
        return [Finding("plugin-parts", what, where, fix)]
    if len({_release(v) for v in parts.values()}) > 1:
        what = "The two parts of JAX's plugin are of different versions."
        return [Finding("plugin-parts", what, where, fix)]
    if jax and {_release(v) for v in parts.values()} != {_release(jax)}:
        what = f"JAX's plugin is of another version than JAX ({jax})."
        return [Finding("plugin-version", what, f"{where}; {_jax(facts)}", fix)]
    return []


def rocm(facts: Facts) -> list[Finding]:
    """ROCm itself, which the plugin does not bring along."""
    name = next((k for k in facts.versions if k.startswith("jax_rocm")), None)
    if name is None or not facts.amd_gpus:
        return []
    wanted = re.sub(r"\D", "", name)[:1]  # jax_rocm7_..., and jax_rocm60_... of old
    found = facts.rocm or facts.versions.get("rocm_sdk_core", "")
    fix = f"sudo apt install rocm    (AMD's packages of ROCm {wanted}: {ROCM_GUIDE})"
    if not found:
        what = f"JAX's plugin needs ROCm {wanted}, which is not installed."
        return [Finding("rocm-missing", what, "no /opt/rocm/.info/version", fix)]
    if found.split(".")[0] != wanted:
        what = f"JAX's plugin needs ROCm {wanted}, and ROCm {found} is installed."
        return [Finding("rocm-version", what, _dashed(name), fix)]
    return []


def architecture(facts: Facts) -> list[Finding]:
    unknown = [a for a in dict.fromkeys(g.arch for g in facts.amd_gpus) if a not in ARCHITECTURES]
    what = "Our kernels were not compiled for {}; they take a relative's tiles, each is checked "
    what += "before its first use, and XLA's serve where one fails."
    fix = f"known: {', '.join(ARCHITECTURES)}; see that the kernels' checks above agree"
    return [
        Finding("arch-unknown", what.format(a), "the driver's list of cards", fix, "warning")
        for a in unknown
    ]


def plan_plugin(facts: Facts) -> list[Finding]:
    """A folder that MUD_PUPPY_ROCM names without a plugin that fits."""
    name = "MUD_PUPPY_ROCM"
    if not facts.variables.get(name) or not facts.plan_fault:
        return []
    what = "Plans for AMD cards cannot be made with the plugin that MUD_PUPPY_ROCM names."
    where = facts.plan_fault.partition(" Install ")[0]
    return [Finding("plan-plugin", what, where, facts.plan_command, "warning")]


def _extra(facts: Facts, maker: str) -> str:
    version = _release(facts.versions.get("jax", ""))
    return f'pip install "jax[{EXTRAS[maker]}]{f"=={version}" if version else ""}"'


def _jax(facts: Facts) -> str:
    return f"jax {facts.versions.get('jax', 'is not installed')}"


def _release(version: str) -> str:
    """ "0.9.1.post3" -> "0.9.1": what a plugin and JAX must have in common."""
    return ".".join(re.findall(r"\d+", version)[:3])


def _dashed(name: str) -> str:
    return name.replace("_", "-")
