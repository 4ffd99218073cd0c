"""Which completions of a step are worth a person's time."""

from collections.abc import Sequence
from itertools import groupby

from jgrpo.reporting.base import CompletionRow


def notable(rows: Sequence[CompletionRow], limit: int) -> list[CompletionRow]:
    """At most `limit` rows: the best and the worst completion of each prompt by advantage, groups with a spread first."""
    groups = [list(group) for _, group in groupby(rows, key=lambda row: row.prompt)]
    pairs = [(max(g, key=_advantage), min(g, key=_advantage)) for g in groups]
    pairs.sort(key=lambda pair: _advantage(pair[0]) == _advantage(pair[1]))
    picked = [row for best, worst in pairs for row in ([best] if best is worst else [best, worst])]
    return picked[:limit]


def _advantage(row: CompletionRow) -> float:
    return row.advantage
