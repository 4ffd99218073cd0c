"""GGUF files in llama.cpp itself: what it computes, how it splits text, and where it stops."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jgrpo.checkpoints.calibrated import CalibratedRounding
from jgrpo.checkpoints.gguf_file import read_gguf, write_gguf
from jgrpo.checkpoints.gguf_tokenizer import model_name
from jgrpo.checkpoints.hf import load_base, load_model_config
from jgrpo.checkpoints.merged import merged_rows
from tests.tiny_checkpoints import make_checkpoint

from .conftest import LORA, UNQUANTIZED, Case, build_case, our_logits, random_adapter

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="needs llama.cpp: pip install -e '.[dev]' (xllamacpp)"
)
PREFIXES = (1, 5, 33, 70, 120)


def llama_cpp(file: Path, **question: Any) -> dict[str, Any]:
    """What tests/parity/llama_cpp_reader.py answers."""
    reader = Path(__file__).with_name("llama_cpp_reader.py")
    done = subprocess.run(
        [sys.executable, reader], input=json.dumps({"file": str(file)} | question), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def assert_computes_the_same(
    case: Case,
    tmp_path: Path,
    kinds: dict[str, float],
    prefixes: tuple[int, ...],
    rounding: CalibratedRounding | None = None,
) -> None:
    """base + a random adapter, exported; llama.cpp against jgrpo on the values in the file.

    llama.cpp rounds activations: to float16 in front of float16 matrices, to 8 bits in front of quantized ones.
    """
    row = np.random.default_rng(0).integers(0, 256, max(prefixes))
    lengths = np.asarray(prefixes, np.int32)
    tokens = np.where(np.arange(max(prefixes)) < lengths[:, None], row, 0).astype(np.int32)
    rows = merged_rows(case.path, case.base, random_adapter(case.config, LORA), LORA)
    for kind, bound in kinds.items():
        file = tmp_path / f"{kind}.gguf"
        write_gguf(file, case.path, rows, case.config, kind, rounding)
        answer = llama_cpp(file, prompts=[row[:n].tolist() for n in prefixes], vocab_size=case.config.vocab_size)
        base = read_gguf(file, case.config, jax.device_put)
        logits = our_logits(case.model(), base, {}, tokens, lengths)[np.cumsum(lengths) - 1]
        assert 0.5 < logits.std() < 5
        np.testing.assert_allclose(answer["logprobs"], log_softmax(logits, -1), rtol=0, atol=bound, err_msg=kind)


# llama.cpp has no other scale of Gemma's scores than head_dim's, and ignores other families' windows.
GEMMA: dict[str, Any] = dict(query_pre_attn_scalar=24)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama-biases", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", dict(sliding_window=None)),
    "phi3": ("phi3", dict(sliding_window=None)),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3", GEMMA),
    "gemma3-windows-only": ("gemma3", GEMMA | dict(sliding_window_pattern=6)),
}


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_jgrpo_does(name, tmp_path, tmp_path_factory):
    base_case, more = CASES[name]
    case = build_case(base_case, tmp_path_factory, **more)
    assert_computes_the_same(case, tmp_path, {"F16": 0.015, "Q8_0": 0.2, "Q4_0": 0.2}, PREFIXES)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_llama_cpp_reads_calibrated_blocks(name, tmp_path, tmp_path_factory):
    base_case, more = CASES[name]
    case = build_case(base_case, tmp_path_factory, **more)
    rows = np.random.default_rng(1).integers(0, 256, (16, 60)).tolist()
    assert_computes_the_same(case, tmp_path, {"Q4_0": 0.2}, PREFIXES, CalibratedRounding(case.config, rows))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64, rope_theta=300.0)
# Eight or so divisors; llama.cpp takes the long ones where its context (256 here) exceeds the original positions.
FACTORS = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + 0.7 * i for i in range(8)]}
LONGROPE = dict(rope_type="longrope", rope_theta=300.0, **FACTORS)
ROPES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "linear": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=300.0)), PREFIXES),
    "llama3": ("llama", {}, PREFIXES),
    "yarn": ("qwen2", dict(rope_parameters=YARN), PREFIXES),
    "yarn-other-attention-factor": ("llama", dict(rope_parameters=YARN | dict(attention_factor=1.5)), PREFIXES),
    "longrope": (
        "phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=64, sliding_window=None),
        (70, 120),
    ),
    "longrope-partial": (
        "phi3",
        dict(
            rope_parameters=LONGROPE
            | {name: factors[:4] for name, factors in FACTORS.items()}
            | dict(partial_rotary_factor=0.5),
            original_max_position_embeddings=64,
            sliding_window=None,
        ),
        (70, 120),
    ),
    "longrope-short": (
        "phi3",
        dict(rope_parameters=LONGROPE, original_max_position_embeddings=512, max_position_embeddings=1024)
        | dict(sliding_window=None),
        PREFIXES,
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_llama_cpp_rotates_as_jgrpo_does(name, tmp_path, tmp_path_factory):
    family, more, prefixes = ROPES[name]
    path = make_checkpoint(tmp_path_factory.mktemp(name), family, **more)
    config = dataclasses.replace(load_model_config(path), context_length=max(PREFIXES))
    case = Case(path, config, load_base(path, config, UNQUANTIZED), None)
    assert_computes_the_same(case, tmp_path, {"F16": 0.015}, prefixes)


# Everything that the splits treat differently: contractions, runs of digits, capitals, spaces, line ends, scripts.
TEXTS = (
    "Hello world, it's what we'LL do: I'm sure they've 12345 or 3.14159 reasons.",
    "def add(a, b):\n    return a + b  # 2 spaces\n\n\n\tTabbed\r\nend   ",
    "  leading and   many    spaces",
    "HTTPServer camelCase XMLHttpRequest2 UPPER lower",
    "naïve café Straße — „Zitat“ … 漢字かな交じり文 русский текст 한국어 🙂👍🏽",
    "path/to/file.py?x=1&y=2//!!/ (a) [b] {c}",
    "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin|>")
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_O200K = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(pattern: str | None, *, digits: bool = False, ignore_merges: bool = False) -> Tokenizer:
    """Trained on the texts; merges of whole words, so that a wrong split shows."""
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def byte_fallback(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """As transformers converts SentencePiece's: a merge for every way to make a token of two, best token first."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(TEXTS[:4] * 3, trainers.BpeTrainer(vocab_size=250, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    singles = [token for token in learned["vocab"] if len(token) == 1]
    made = ["".join(merge) for merge in learned["merges"]]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *BYTES, *singles, *made])
    vocab = {token: i for i, token in enumerate(tokens)}
    pairs = [(t[:i], t[i:]) for t in dict.fromkeys(made) for i in range(1, len(t)) if {t[:i], t[i:]} <= vocab.keys()]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL])
    return tokenizer


REPLACE = normalizers.Replace(" ", "▁")
TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "llama3": lambda: byte_level(WORDS + r"\p{N}{1,3}" + REST, ignore_merges=True),
    "phi4": lambda: byte_level(WORDS + r"\p{N}{1,3}" + REST),
    "qwen2": lambda: byte_level(WORDS + r"\p{N}" + REST),
    "phi4-mini": lambda: byte_level(rf"{LOWER}{CONTRACTIONS}?|{UPPER}{CONTRACTIONS}?|\p{{N}}{{1,3}}" + REST_O200K),
    "mistral-nemo": lambda: byte_level(rf"{LOWER}|{UPPER}|\p{{N}}" + REST_O200K, ignore_merges=True),
    "smollm": lambda: byte_level(None, digits=True),
    "gpt2": lambda: byte_level(None),
    "llama2": lambda: byte_fallback(normalizers.Sequence([normalizers.Prepend("▁"), REPLACE]), None),
    "gemma": lambda: byte_fallback(REPLACE, pre_tokenizers.Split(" ", "merged_with_previous")),
}


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_splits_text_as_the_tokenizer_does(name, with_bos, tmp_path):
    tokenizer = TOKENIZERS[name]()
    bos = "<s>" if tokenizer.token_to_id("<s>") is not None else "<|begin|>"
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    # One layer suffices: the weights play no part.
    path = make_checkpoint(tmp_path / "model", "llama", vocab_size=tokenizer.get_vocab_size() + 3, num_hidden_layers=1)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token=bos)
    fast.save_pretrained(path)
    # Where a text begins with a special token, llama.cpp puts SentencePiece's space behind it.
    texts = TEXTS[:-1] if name == "llama2" else TEXTS
    config = load_model_config(path)
    base = load_base(path, config, UNQUANTIZED)
    write_gguf(tmp_path / "x.gguf", path, merged_rows(path, base, {}, LORA), config, "F16")
    answer = llama_cpp(tmp_path / "x.gguf", texts=texts)
    for text, got in zip(texts, answer["tokens"], strict=True):
        assert got == fast.encode(text), text


def test_llama_cpp_stops_at_every_end_token(tmp_path, tmp_path_factory):
    case = build_case("qwen2", tmp_path_factory)
    generation = json.loads((case.path / "generation_config.json").read_text())
    (case.path / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [256, 97, 98]}))
    write_gguf(tmp_path / "x.gguf", case.path, merged_rows(case.path, case.base, {}, LORA), case.config, "Q8_0")
    assert llama_cpp(tmp_path / "x.gguf", may_stop=[256, 97, 98, 99])["stops"] == [256, 97, 98]


def test_the_name_of_phi():
    # From "phi-3" in the name llama.cpp concludes that these tokens are there, and fails without them.
    assert "phi-3" in model_name("phi3", ["<s>", "</s>", "<unk>", "<|endoftext|>", "a"])
    assert not {"phi-3", "phi3"} & set(model_name("phi3", ["<|endoftext|>", "a"]).split())
    assert model_name("qwen2", []).startswith("qwen2 ")
