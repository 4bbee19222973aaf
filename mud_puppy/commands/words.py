"""What the verbs that need a language model say of one that scores."""

from mud_puppy.errors import UserError


def check_words(source: str, adapter: str | None = None, trust_remote_code: bool = False) -> None:
    """UserError, before weights are read, for a reward model or the adapter of one."""
    import mud_puppy as mp
    from mud_puppy.weights import adapter_head

    arch = mp.abstract(source, trust_remote_code=trust_remote_code)[0].arch
    if arch.task != "lm":
        raise UserError(
            f"{source}: gives {arch.labels} scores of each {arch.task}, no words; see what it says "
            "of texts with mud-puppy score"
        )
    if adapter is not None and adapter_head(adapter) is not None:
        raise UserError(
            f"{adapter}: is the adapter of a model that gives scores, no words; see what it says "
            "of texts with mud-puppy score"
        )
