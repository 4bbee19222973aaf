"""The table of families in docs/models.md: measured against transformers, written or held to it.

    python tools/family_table.py --write    measures every row of tests/model/family_rows.py
    python tools/family_table.py llama      prints these rows

It needs torch, transformers and peft. tests/model/test_families.py holds every row to the bounds.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.model import family_rows as rows  # noqa: E402
from tests.model.family_cases import CASES  # noqa: E402

PAGE = ROOT / "docs/models.md"
START, END = "<!-- families: tools/family_table.py --write -->", "<!-- end of families -->"
HEAD = (
    "| case | `model_type` | float32 | bfloat16 | gradient | round trip | greedy | adapter |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def line(case: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        made = rows.make(case, Path(folder))
        row = rows.measure(made, Path(folder))
        numbers = (f"{x:.1e}" for x in (row.float32, row.bfloat16, row.gradient))
        same = ("yes" if x else "NO" for x in (row.round_trip, row.greedy, row.adapter))
        cells = (f"`{case}`", made.torch.config.model_type, *numbers, *same)
    print(*cells, flush=True)
    return f"| {' | '.join(cells)} |\n"


def main(arguments: list[str]) -> None:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if arguments != ["--write"]:
        for case in arguments or CASES:
            line(case)
        return
    table = HEAD + "".join(map(line, CASES))
    before, rest = PAGE.read_text().split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{table}{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
