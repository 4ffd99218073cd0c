"""What did training change? The same prompts through the base model and through the adapter, next to each other.

    python examples/generate_with_adapter.py --model demo --adapter runs/my-run/adapter --prompt "What is 12 + 30?"

`load` keeps the quantized weights in memory once for all calls; the adapter is a small pytree beside them, and `{}` in
its place is the base model.
"""

import argparse

import jgrpo
from jgrpo.generate import load


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="directory or hub id of the base model (default: %(default)s)")
    parser.add_argument("--adapter", required=True, help="directory of a PEFT adapter, such as a run's adapter/")
    parser.add_argument("--prompt", action="append", required=True, help="give it several times for several prompts")
    parser.add_argument("--max-completion-length", type=int, default=128)
    args = parser.parse_args()

    tuned = load(args.model, args.adapter)
    base = tuned._replace(lora={})
    # A list of messages goes through the model's chat template; a plain string would be taken as it is.
    prompts = args.prompt
    if tuned.policy.tokenizer.chat_template:
        prompts = [[{"role": "user", "content": prompt}] for prompt in args.prompt]

    settings = dict(max_completion_length=args.max_completion_length, temperature=0.0)
    before = jgrpo.generate(base, prompts, **settings)
    after = jgrpo.generate(tuned, prompts, **settings)
    for prompt, (base_text,), (tuned_text,) in zip(args.prompt, before, after, strict=True):
        print(f"prompt : {prompt}\nbase   : {base_text}\nadapter: {tuned_text}\n")


if __name__ == "__main__":
    main()
