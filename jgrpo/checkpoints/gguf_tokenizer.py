"""A Hugging Face tokenizer in GGUF's terms: `tokenizer.json` of the BPE kind, byte-level or with byte fallback.

llama.cpp knows byte-level tokenizers by the regular expression that splits the text before the merges, and has a name for
each; one that it does not know is refused, because its tokens would be wrong without a word. Byte-fallback ones
(SentencePiece: Llama 2, Gemma) merge the pair of the best score; the rank of a merge is that score, negated.
"""

from pathlib import Path
from typing import Any

from jgrpo.checkpoints.source import read_json
from jgrpo.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLITS = {
    _CONTRACTIONS + r"\p{N}{1,3}" + _REST: "llama-bpe",
    _CONTRACTIONS + r"\p{N}" + _REST: "qwen2",
    r"\p{N}": "smollm",
    None: "gpt-2",
}
"""Pattern of the tokenizer's split and llama.cpp's name of it; None: byte-level's own pattern only."""


def add_tokenizer(gguf: Any, writer: Any, source: Path, vocab_size: int) -> None:
    """Add tokens, merges, special ids and chat template; rows of the embedding without a token become unused ones."""
    file = source / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{source}: no tokenizer.json, which GGUF export reads; save the tokenizer with transformers 4 or 5"
        )
    tokenizer = read_json(file)
    model = tokenizer["model"]
    if model.get("type") != "BPE":
        raise UserError(f"{file}: a tokenizer of type {model.get('type')!r} is not supported for GGUF, expected 'BPE'")
    tokens, types = _tokens(gguf, tokenizer, vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores(
            [ranks.get(token, -1e6 if kind == 1 else 0.0) for token, kind in zip(tokens, types, strict=True)]
        )
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, file))
        writer.add_token_merges(merges)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, source, tokens)


def _tokens(gguf: Any, tokenizer: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    by_id = {i: (token, kinds.NORMAL) for token, i in tokenizer["model"]["vocab"].items()}
    if tokenizer["model"].get("byte_fallback"):
        by_id |= {i: (t, kinds.BYTE) for i, (t, _) in by_id.items() if t.startswith("<0x") and len(t) == 6}
    for added in tokenizer.get("added_tokens", ()):
        by_id[added["id"]] = (added["content"], kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    listed = [by_id.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(vocab_size)]
    return [token for token, _ in listed], [int(kind) for _, kind in listed]


def _pre_tokenizer(tokenizer: dict[str, Any], file: Path) -> str:
    settings = tokenizer.get("pre_tokenizer") or {}
    steps = settings.get("pretokenizers", [settings])
    if not any(step.get("type") == "ByteLevel" for step in steps):
        raise UserError(f"{file}: neither byte-level nor with byte fallback, which is all that GGUF export knows")
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    patterns += [r"\p{N}" for step in steps if step.get("type") == "Digits"]
    if not patterns and not any(step.get("use_regex", True) for step in steps if step.get("type") == "ByteLevel"):
        return "default"
    pattern = patterns[0] if patterns else None
    if len(patterns) > 1 or pattern not in _SPLITS:
        raise UserError(
            f"{file}: llama.cpp's name of the split {patterns} is not known; export 16 bits and convert them with llama.cpp"
        )
    return _SPLITS[pattern]


def _add_special(writer: Any, source: Path, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(source)
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(loaded, f"{name}_token_id")
        if index is not None and index < len(tokens):
            getattr(writer, f"add_{name}_token_id")(index)
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
