"""A Hugging Face tokenizer in GGUF's terms: `tokenizer.json` of the BPE kind, byte-level or with byte fallback.

llama.cpp knows byte-level tokenizers by the regular expression that splits the text before the merges, and has a name for
each; one that it does not know is refused, because its tokens would be wrong without a word. Byte-fallback ones
(SentencePiece: Llama 2, Gemma) merge the pair of the best score; the rank of a merge is that score, negated.
"""

from pathlib import Path
from typing import Any

from jgrpo.checkpoints.source import read_json
from jgrpo.checkpoints.tokenizer import eos_ids
from jgrpo.errors import UserError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_REST, _REST_O200K = (r"| ?[^\s\p{L}\p{N}]+[\r\n" + slash + r"]*|" + _SPACE for slash in ("", "/"))
_SPLITS = {
    (_CONTRACTIONS + "|" + _WORD + r"\p{N}{1,3}" + _REST, True): "llama-bpe",
    (_CONTRACTIONS + "|" + _WORD + r"\p{N}{1,3}" + _REST, False): "dbrx",
    (_CONTRACTIONS + "|" + _WORD + r"\p{N}" + _REST, False): "qwen2",
    (f"{_LOWER}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?" + r"|\p{N}{1,3}" + _REST_O200K, False): "gpt-4o",
    (f"{_LOWER}|{_UPPER}" + r"|\p{N}" + _REST_O200K, True): "tekken",
    (r"\p{N}", False): "smollm",
    (None, False): "gpt-2",
}
"""(pattern of the tokenizer's split, whether whole words are looked up before they are merged) and llama.cpp's name of it:
Llama 3, Phi-4, Qwen 2 to 3, Phi-4-mini, Mistral NeMo, SmolLM, GPT-2; pattern None: byte-level's own only."""
_NO_MERGE = "\u2581 \u2581"
"""llama.cpp refuses a file without merges. No byte has this symbol, so this pair is never there to be merged."""


def add_tokenizer(gguf: Any, writer: Any, source: Path, vocab_size: int) -> list[str]:
    """Add tokens, merges, special ids and chat template; returns the tokens.

    Rows of the embedding without a token become unused ones. Raises UserError for a tokenizer that GGUF has no name for.
    """
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
        writer.add_add_space_prefix(_prefixes_space(tokenizer))
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores(
            [ranks.get(token, -1e6 if kind == 1 else 0.0) for token, kind in zip(tokens, types, strict=True)]
        )
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(tokenizer, file))
        writer.add_token_merges(merges or [_NO_MERGE])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, source, tokens)
    return tokens


def model_name(family: str, tokens: list[str]) -> str:
    """`general.name`. From "phi-3" in it llama.cpp concludes that spaces behind special tokens are dropped, as Phi-3's
    tokenizer does, and fails where these tokens are missing: Phi-4 must not be called so, though its family is "phi3"."""
    known = {"<s>", "</s>", "<unk>", "<|endoftext|>"} <= set(tokens)
    return f"{family if family != 'phi3' else 'phi-3' if known else 'phi'} trained with jgrpo"


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
    patterns += [r"\p{N}" for step in steps if step.get("type") == "Digits" and step.get("individual_digits")]
    whole_words = bool(tokenizer["model"].get("ignore_merges"))
    split = bool(patterns) or any(step.get("use_regex", True) for step in steps if step.get("type") == "ByteLevel")
    if not split and not tokenizer["model"]["merges"]:
        return "default"  # where nothing is merged, it makes no difference how text is split
    name = _SPLITS.get((patterns[0] if patterns else None, whole_words))
    if name is None or len(patterns) > 1 or not split:
        raise UserError(
            f"{file}: llama.cpp's name of the split {patterns} is not known; export 16 bits and convert them with llama.cpp"
        )
    return name


def _prefixes_space(tokenizer: dict[str, Any]) -> bool:
    """Whether a text gets a space in front: Llama 2 does that (in one of two ways), Gemma does not."""
    normalizer, splitter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*normalizer.get("normalizers", [normalizer]), *splitter.get("pretokenizers", [splitter])]
    metaspace = [step for step in steps if step.get("type") == "Metaspace"]
    return any(step.get("type") == "Prepend" for step in steps) or any(
        step.get("prepend_scheme", "always") != "never" for step in metaspace
    )


def _add_special(writer: Any, source: Path, tokens: list[str]) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(source)
    for name in ("bos", "eos", "pad", "unk"):
        index = getattr(loaded, f"{name}_token_id")
        if index is not None and index < len(tokens):
            getattr(writer, f"add_{name}_token_id")(index)
    # llama.cpp has two more places for tokens that end a completion.
    others = [index for index in eos_ids(source) if index != loaded.eos_token_id and index < len(tokens)]
    for name, index in zip(("eot", "eom"), others, strict=False):
        getattr(writer, f"add_{name}_token_id")(index)
    # Without these keys it assumes the habits of the tokenizer that it knows the split by.
    ids = loaded.encode("a")
    writer.add_add_bos_token(bool(ids) and ids[0] == loaded.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == loaded.eos_token_id)
    if isinstance(loaded.chat_template, str):
        writer.add_chat_template(loaded.chat_template)
