"""The account of what happened to rows on their way to examples: what was cut, left out or bad."""

from dataclasses import dataclass

MAX_MESSAGES = 1000
SKIP_HINT = "(correct it, or leave bad rows out with on_bad_rows skip)"


@dataclass(frozen=True)
class BadRows:
    """Rows that were left out because something is wrong with them; `messages` keeps the first
    1,000."""

    count: int = 0
    messages: tuple[str, ...] = ()

    def __add__(self, other: "BadRows") -> "BadRows":
        messages = (self.messages + other.messages)[:MAX_MESSAGES]
        return BadRows(self.count + other.count, messages)


@dataclass(frozen=True)
class Report:
    """What `encode` did to the rows, in counts of examples (`unclosed` counts trained turns).

    truncated: cut to max_seq_length, with trained tokens left.
    prompt_cut: the prompt cut at its start, so that the answers fit into max_seq_length whole.
    answer_too_long: left out, since an answer alone does not fit.
    too_long: left out by on_long="skip".
    cut_away: left out because cutting would have removed every trained token.
    unclosed: trained turns that no special token ends, so that the model may not learn to stop.
    bad: rows that could not be made into an example, left out by on_bad_rows="skip".
    """

    truncated: int = 0
    prompt_cut: int = 0
    answer_too_long: int = 0
    too_long: int = 0
    cut_away: int = 0
    unclosed: int = 0
    bad: BadRows = BadRows()

    def __add__(self, other: "Report") -> "Report":
        return Report(
            self.truncated + other.truncated,
            self.prompt_cut + other.prompt_cut,
            self.answer_too_long + other.answer_too_long,
            self.too_long + other.too_long,
            self.cut_away + other.cut_away,
            self.unclosed + other.unclosed,
            self.bad + other.bad,
        )

    def lines(self) -> list[str]:
        """One sentence for each thing that happened; empty when nothing did."""
        said = (
            (self.truncated, "examples cut to max_seq_length"),
            (self.prompt_cut, "prompts cut at their start, so that the answers fit"),
            (
                self.answer_too_long,
                "examples left out: an answer alone is longer than max_seq_length",
            ),
            (self.too_long, "examples left out: longer than max_seq_length"),
            (self.cut_away, "examples left out: max_seq_length cuts off all their trained tokens"),
            (
                self.unclosed,
                "trained turns have no end-of-turn token: the model may not learn to stop",
            ),
            (self.bad.count, "bad rows left out"),
        )
        return [f"{count} {what}" for count, what in said if count] + list(self.bad.messages)
