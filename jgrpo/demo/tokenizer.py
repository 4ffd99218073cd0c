"""The demo model's tokenizer: bytes, and one token for each thing that a Countdown solution is made of.

It is a `Qwen2Tokenizer`, because `transformers` gives a checkpoint of type "qwen2" that class, with its own splitting
rule (one digit at a time), whatever `tokenizer.json` says. So the numbers up to 99, with their space and
parenthesis, are added tokens, which are found before any splitting; so are operators, tags and the three fixed phrases
of the Countdown prompt ("superwords", Liu et al. 2025, arXiv:2503.13423), which keep the demo's sequences short.
All other text is bytes: no merges.
"""

from tokenizers import pre_tokenizers
from transformers import AddedToken, Qwen2Tokenizer

from jgrpo.data.countdown import LARGEST_VALUE, PROMPT

PAD, USER, ASSISTANT, SYSTEM, END = "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
TAGS = ("<think>\n", "</think>\n<answer>", "<think>", "</think>", "<answer>", "</answer>")
WORDS = (" no\n", " yes\n", " +", " -", " *", " /", " =")

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def prompt_phrases() -> list[str]:
    """The fixed parts of the Countdown prompt, between the numbers."""
    before, rest = PROMPT.split("{numbers}")
    middle, after = rest.split("{target}")
    return [before.rstrip(), middle, after]


def number_tokens() -> list[str]:
    """12, ( 12, 12 ) and so on, each with and without a space before it, as far as expressions have them."""
    numbers = range(LARGEST_VALUE + 1)
    forms = ("{}", " {}", "({}", " ({}", " {})")
    return [form.format(n) for form in forms for n in numbers if form != "{}" or n > 9]


def build_tokenizer() -> Qwen2Tokenizer:
    """The tokenizer with its special tokens and chat template."""
    alphabet = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(
        vocab=alphabet,
        merges=[],
        pad_token=PAD,
        unk_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT, SYSTEM],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    texts = (*number_tokens(), *WORDS, *TAGS, *prompt_phrases())
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    return tokenizer
