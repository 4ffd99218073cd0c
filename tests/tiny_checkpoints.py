"""Tiny random Hugging Face checkpoints of every supported family, written by `transformers` itself.

`make_checkpoint` returns a directory with config, generation config, safetensors and a byte-level tokenizer
with a chat template. The sizes are deliberately awkward (head_dim ≠ hidden / heads, one key/value head, more
embedding rows than tokens), and every parameter is random, so that a norm, bias or scale that
is left out shows in the logits.
"""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")
VOCAB_SIZE = 263
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_COMMON = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=256,
    pad_token_id=None,
    tie_word_embeddings=False,
)
_LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(rope_parameters=_LLAMA3_ROPE, rms_norm_eps=1e-5),
    "qwen2": dict(num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-6),
    "qwen3": dict(head_dim=32, rms_norm_eps=1e-6),
    "mistral": dict(sliding_window=8, rms_norm_eps=1e-5),
    "phi3": dict(
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        sliding_window=40,
        rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.75),
    ),
    # Caps that these small scores and logits feel; three layers, so that both kinds of layers are there.
    "gemma2": dict(
        num_hidden_layers=3,
        head_dim=24,
        sliding_window=8,
        query_pre_attn_scalar=10,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        tie_word_embeddings=True,
    ),
    "gemma3_text": dict(
        num_hidden_layers=3,
        num_key_value_heads=1,
        head_dim=24,
        sliding_window=8,
        sliding_window_pattern=2,
        query_pre_attn_scalar=10,
        tie_word_embeddings=True,
        rope_parameters=dict(
            full_attention=dict(rope_type="linear", factor=8.0, rope_theta=700.0),
            sliding_attention=dict(rope_type="default", rope_theta=90.0),
        ),
    ),
}
"""What each family sets on top of the common sizes."""


def make_checkpoint(
    directory: Path,
    family: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    pad_token: str | None = "<|pad|>",
    chat_template: str | None = CHAT_TEMPLATE,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `family` (a key of FAMILIES) into `directory` and return the directory.

    `overrides` are fields of the Hugging Face config; `pad_token=None` and `chat_template=None` leave those out
    of the tokenizer. Token ids 0–255 are the bytes, 256–259 the special tokens.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **FAMILIES[family], **overrides})
    model = AutoModelForCausalLM.from_config(config)
    _randomize(model, seed)
    model.generation_config = GenerationConfig(eos_token_id=[258, 256], pad_token_id=259)
    model.to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer(pad_token=pad_token, chat_template=chat_template).save_pretrained(directory)
    return Path(directory)


def make_tokenizer(
    *, pad_token: str | None = "<|pad|>", chat_template: str | None = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes, then SPECIAL_TOKENS; no merges, so one ASCII character is one token."""
    alphabet = _byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token=pad_token)
    if chat_template is not None:
        fast.chat_template = chat_template
    return fast


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    """Matrices N(0, 1/in), vectors (norm scales, biases) their initial value + N(0, 0.1²)."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 2:
            parameter.copy_(noise * parameter.shape[1] ** -0.5)
        else:
            parameter.add_(0.1 * noise)
