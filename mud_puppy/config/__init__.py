"""The configuration of a run: keys, YAML, flags and their one-line errors."""

from mud_puppy.config.keys import DTYPES, KEYS, Config
from mud_puppy.config.output import check_output, clear_output
from mud_puppy.config.source import flag

__all__ = ["DTYPES", "KEYS", "Config", "check_output", "clear_output", "flag"]
