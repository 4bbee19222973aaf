"""The two command lines of one GPTQ run, and the files that it leaves."""


def command(keys, *flags):
    """The training form's command line."""
    pairs = ((f"--{key.replace('_', '-')}", str(value)) for key, value in keys.items())
    return [word for pair in pairs for word in pair] + list(flags)


def verb(keys, *flags):
    """`mud-puppy quantize` of the same run; the output is the model's folder."""
    words = ["quantize", keys["model"], "--to", "gptq", "--group", "16", "--samples", "14"]
    names = ("dataset", "output", "max_seq_length", "precision")
    return words + command({name: keys[name] for name in names}, *flags)


def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
