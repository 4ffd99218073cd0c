"""Tokenizers in GGUF's terms: which kind a file is, and the scores of SentencePiece's."""

import json
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from jgrpo.checkpoints.gguf_tokenizer import add_tokenizer
from jgrpo.errors import UserError
from tests.tiny_checkpoints import make_tokenizer


def written(source, tmp_path, vocab_size: int = 300) -> dict[str, Any]:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    add_tokenizer(gguf, writer, source, vocab_size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "x.gguf").fields.items()
    return {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in fields}


def test_byte_fallback_tokenizers_merge_by_score(tmp_path):
    vocab = {"<unk>": 0, "<0x41>": 1, "▁": 2, "a": 3, "b": 4, "ab": 5, "▁ab": 6}
    model = models.BPE(vocab=vocab, merges=[("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), unk_token="<unk>").save_pretrained(tmp_path)
    found = written(tmp_path, tmp_path, 8)
    assert found["model"] == "llama"
    assert found["tokens"][5:] == ["ab", "▁ab", "[PAD7]"]
    assert found["token_type"][:3] == [3, 6, 1]
    scores = found["scores"]
    # The first merge is the best one, and no pair makes a single character.
    assert scores[5] > scores[6] > scores[3]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"use_regex": True}, "gpt-2"),
        ({}, "default"),
        ({"split": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}, "qwen2"),
        ({"split": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+", "ignore_merges": True}, "llama-bpe"),
        ({"split": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"}, "dbrx"),
    ],
)  # fmt: skip
def test_byte_level_tokenizers_are_known_by_their_split(change, expected, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    byte_level = tokenizer["pre_tokenizer"] | {"use_regex": change.get("use_regex", False)}
    steps = (
        [{"type": "Split", "pattern": {"Regex": change["split"]}, "behavior": "Isolated", "invert": False}]
        if "split" in change
        else []
    )
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, byte_level]}
    tokenizer["model"]["ignore_merges"] = change.get("ignore_merges", False)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert written(tmp_path, tmp_path)["pre"] == expected


def test_other_kinds_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        written(tmp_path, tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(UserError, match="'Unigram' is not supported for GGUF, expected 'BPE'"):
        written(tmp_path, tmp_path)


def test_a_merging_tokenizer_without_a_split_is_refused(tmp_path):
    # llama.cpp's "default" splits; only where nothing is merged is that the same.
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = [["!", "!"]]
    tokenizer["model"]["vocab"]["!!"] = 262
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"name of the split \[\] is not known"):
        written(tmp_path, tmp_path)
