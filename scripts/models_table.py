"""Run the parity tests and write what they showed into the marked tables of `docs/models.md`.

    python scripts/models_table.py                     # runs tests/parity (about a minute)
    python scripts/models_table.py --results FILE.xml  # from `pytest tests/parity --junitxml FILE.xml`

A cell is ✓ where every test of that family and check passed, ✗ where one failed, and empty where there is none.
"""

import argparse
import ast
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping
from pathlib import Path

from jgrpo.models.families import FAMILIES

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "models.md"
Results = Mapping[str, bool]
"""test id (function[parameters]) -> passed."""

CHECKS = {
    "logits": "test_logits_of_padded_rows_equal_transformers_row_by_row",
    "log-probabilities": "test_token_logprobs_equal_log_softmax_of_transformers",
    "cached decoding": "test_prefill_and_cached_decode_equal_the_full_forward",
    "adapter = PEFT": "test_exported_adapter_gives_the_same_logits_in_peft",
    "gradients = PEFT": "test_gradients_equal_pefts",
    "int4": "test_int4_logits_equal_transformers_on_dequantized_weights",
    "merged": "test_merged_int4_base_equals_base_plus_adapter",
    "GPTQ out": "test_gptq_export_is_read_word_by_word_and_by_jgrpo",
    "GPTQ calibrated": "test_layers_one_by_one_are_the_model_and_a_small_adapter_survives",
    "GGUF out": "test_gguf_is_read_by_transformers",
    "llama.cpp": "test_llama_cpp_computes_what_jgrpo_does",
}
FORMATS = {"NF4": "nf4-double", "GPTQ": "gptq-asym", "AWQ": "awq"}
VALUES = "test_values_are_the_formats_bit_for_bit"


def run_tests() -> Path:
    """Results of tests/parity as a JUnit file."""
    file = Path(tempfile.mkdtemp()) / "parity.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "tests/parity", "-q", "--junitxml", str(file)], cwd=ROOT, check=False
    )
    return file


def read_results(file: Path) -> tuple[dict[str, bool], float]:
    """Passed or not of every test that ran, and the seconds of all."""
    suite = next(ET.parse(file).getroot().iter("testsuite"))
    ran = [case for case in suite.iter("testcase") if case.find("skipped") is None]
    cases = {case.get("name", ""): case.find("failure") is None and case.find("error") is None for case in ran}
    return cases, float(suite.get("time", 0))


def cell(results: Results, test: str, wanted: Iterable[str]) -> str:
    """✓, ✗ or nothing, over the tests whose parameters hold all of `wanted`."""
    found = [
        ok
        for name, ok in results.items()
        if name.startswith(f"{test}[") and all(part in _parameters(name) for part in wanted)
    ]
    return "" if not found else "✓" if all(found) else "✗"


def _parameters(name: str) -> set[str]:
    # Parameters are joined by dashes, and some have dashes themselves: every run of them is a candidate.
    parts = name[name.index("[") + 1 : -1].split("-")
    return {"-".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}


def family_table(results: Results) -> list[str]:
    """Family × check, and family × format."""
    rows = [["family", *CHECKS, *(f"{name} in" for name in FORMATS), "lines"]]
    for family in FAMILIES:
        case = {"gemma3_text": "gemma3"}.get(family, family)
        checks = [cell(results, test, [case]) for test in CHECKS.values()]
        formats = [
            cell(results, "test_logits_equal_transformers_on_the_formats_values", [f, family]) for f in FORMATS.values()
        ]
        rows.append([f"`{family}`", *checks, *formats, str(lines_of(family))])
    return table(rows)


def format_table(results: Results) -> list[str]:
    """Format × values."""
    names = sorted({n[n.index("[") + 1 : -1].split("-", 1)[1] for n in results if n.startswith(VALUES)})
    rows = [["format", "values bit for bit", "with modules left in 16 bits"]]
    rows += [[f"`{n}`", cell(results, VALUES, [f"all-{n}"]), cell(results, VALUES, [f"skipped-{n}"])] for n in names]
    return table(rows)


def rope_table(results: Results) -> list[str]:
    """Kind of rotary embedding × frequencies and logits, and the logits of the exported GGUF file."""
    test, in_llama_cpp = "test_frequencies_and_logits_equal_transformers", "test_llama_cpp_rotates_as_jgrpo_does"
    names = [n[n.index("[") + 1 : -1] for n in results if n.startswith(f"{test}[")]
    rows = [[f"`{n}`", cell(results, test, [n]), cell(results, in_llama_cpp, [n])] for n in names]
    return table([["kind", "frequencies and logits", "GGUF in llama.cpp"], *rows])


def lines_of(family: str) -> int:
    """Lines of a family's entries in the tables: what it is, and the names that differ from Llama's."""
    total = 0
    for file, target in (("jgrpo/models/families.py", "FAMILIES"), ("jgrpo/checkpoints/names.py", "TABLES")):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        tables = {node.targets[0].id if isinstance(node, ast.Assign) else node.target.id: node for node in tree.body
                  if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(getattr(node, "target", None) or node.targets[0], ast.Name)}  # fmt: skip
        entries = tables[target].value
        for key, value in zip(entries.keys, entries.values, strict=True):
            if key.value == family:
                # The names of a helper table count where the entry refers to it.
                used = [tables[n.id] for n in ast.walk(value) if isinstance(n, ast.Name) and n.id in tables]
                total += sum(node.end_lineno - node.lineno + 1 for node in (value, *used))
    return total


def table(rows: list[list[str]]) -> list[str]:
    """Markdown."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]


def fill(text: str, name: str, lines: list[str]) -> str:
    """Replace what stands between the marks of a table."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
    assert re.search(pattern, text, re.DOTALL), name
    return re.sub(pattern, lambda match: match[1] + "\n".join(lines) + "\n" + match[2], text, flags=re.DOTALL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="JUnit file of tests/parity")
    results, seconds = read_results(parser.parse_args().results or run_tests())
    text = DOCUMENT.read_text(encoding="utf-8")
    for name, lines in {
        "families": family_table(results),
        "formats": format_table(results),
        "rope": rope_table(results),
    }.items():
        text = fill(text, name, lines)
    failed = sorted(name for name, passed in results.items() if not passed)
    summary = f"{len(results)} parity tests, {len(results) - len(failed)} passed"
    DOCUMENT.write_text(fill(text, "summary", [summary + "."]), encoding="utf-8")
    print(f"{summary} in {seconds:.0f} s; wrote {DOCUMENT}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
