"""The checkpoint's tokenizer, its pad token, and the ids that end a completion."""

from pathlib import Path
from typing import Any

from jgrpo.checkpoints.source import read_json, resolve_checkpoint
from jgrpo.errors import UserError

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
PAD_CANDIDATES = ("<|finetune_right_pad_id|>", "<|fim_pad|>", "<|vision_pad|>", "<pad>", "<|pad|>", "[PAD]", "<unk>")
"""Tokens that never occur in text, by model family (Llama 3, Qwen, Mistral and Llama 2)."""


def load_tokenizer(model: str | Path, revision: str | None = None) -> Any:
    """`transformers.AutoTokenizer` of the checkpoint, always with a pad token.

    Where the checkpoint defines none, the first of `PAD_CANDIDATES` in its vocabulary is used, else the EOS token:
    masks come from lengths, never from comparing ids with the pad id, so sharing it with EOS is harmless.
    Raises UserError if there is no tokenizer or it cannot be read.
    """
    path = resolve_checkpoint(model, revision)
    if not any((path / name).is_file() for name in _FILES):
        raise UserError(f"{path}: no tokenizer ({', '.join(_FILES[:3])}); copy the files from the original checkpoint")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path}: the tokenizer cannot be read ({reason}); copy its files again") from error
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in PAD_CANDIDATES if token in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise UserError(
                f"{path}: the tokenizer has neither a pad nor an EOS token; set one in tokenizer_config.json"
            )
        tokenizer.pad_token = pad
    return tokenizer


def eos_ids(model: str | Path, tokenizer: Any = None, revision: str | None = None) -> tuple[int, ...]:
    """Every id that ends a completion: those of `generation_config.json`, else `config.json`, and the tokenizer's own.

    The tokenizer's is added because a chat model ends its turn with it whatever the other files say.
    """
    path = resolve_checkpoint(model, revision)
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        declared = read_json(path / name).get("eos_token_id") if (path / name).is_file() else None
        if declared is not None and not ids:
            ids += declared if isinstance(declared, list) else [declared]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(ids))
