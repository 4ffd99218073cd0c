"""docs/models.md has a row for every family, kind of rotary embedding and format, and no failed check."""

from pathlib import Path

from jgrpo.models.config import _REQUIRED
from jgrpo.models.families import FAMILIES
from tests.quantized_checkpoints import FORMATS

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def test_every_family_kind_and_format_has_its_row():
    assert all(f"\n| `{name}` |" in TEXT for name in (*FAMILIES, *FORMATS, *(set(_REQUIRED) - {"default"})))


def test_no_check_failed():
    assert "✗" not in TEXT
    assert TEXT.count("✓") > 9 * len(FAMILIES)
