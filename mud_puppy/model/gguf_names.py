"""Names of a GGUF file's tensors and Hugging Face's, by the gguf package's own table, which
llama.cpp's converter writes them with."""

from typing import Any

import gguf

from mud_puppy.model.families import read_config, rows

_NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}


def hf_names(architecture: str, config: Any) -> dict[str, list[str]]:
    """The HF tensors that each tensor of the file may be: one, or those of its experts, which
    GGUF keeps in one."""
    arch = read_config(config)
    table = gguf.get_tensor_name_map(_NUMBERS[architecture], arch.layers)
    found = {}
    for row in rows(arch).values():
        for i in range(arch.layers if "{i}" in row.hf else 1):
            name = table.get_name(row.hf.replace("{e}.", "").format(i=i), (".weight", ".bias"))
            experts = range(arch.sizes[row.axes[0]]) if "{e}" in row.hf else (0,)
            if name is not None:
                found[name] = [row.hf.format(i=i, e=e) for e in experts]
    return found
