"""The demo model's tokenizer: byte-level BPE in Hugging Face format, so that any text can be encoded.

Numbers up to 99, with their space and parenthesis, are single tokens; so are the tags and the three fixed phrases
of the Countdown prompt ("superwords", Liu et al. 2025, arXiv:2503.13423), which keeps the demo's sequences short.
Everything else falls back to bytes.
"""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from jgrpo.data.countdown import LARGEST_VALUE, PROMPT

PAD, USER, ASSISTANT, SYSTEM, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TAGS = ("<think>\n", "</think>\n<answer>", "<think>", "</think>", "<answer>", "</answer>")
PIECE = r" (?:no|yes)\n| ?\(?\d{1,2}\)?| ?[A-Za-z]+| ?[^\sA-Za-z\d]+|\s"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def prompt_phrases() -> list[str]:
    """The fixed parts of the Countdown prompt, between the numbers."""
    before, rest = PROMPT.split("{numbers}")
    middle, after = rest.split("{target}")
    return [before.rstrip(), middle, after]


def _pieces() -> list[str]:
    numbers = [str(n) for n in range(LARGEST_VALUE + 1)]
    spaced = [f" {n}" for n in numbers]
    words = [" no\n", " yes\n", " +", " -", " *", " /", " ="]
    return (
        numbers + spaced + [f"({n}" for n in numbers] + [f" ({n}" for n in numbers] + [f"{n})" for n in spaced] + words
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer with its special tokens and chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False, min_frequency=1)
    tokenizer.train_from_iterator(_pieces(), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in (*TAGS, *prompt_phrases())])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
