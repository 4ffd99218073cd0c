"""Ask llama.cpp itself (the package xllamacpp) about a GGUF file, in a process of its own: its assertions abort.

Reads {"file", "prompts": lists of token ids, "texts"} as JSON from stdin; prints {"logprobs": of the token behind each prompt,
"tokens": of each text, "stops": the token ids of "may_stop" that end a completion}.
"""

import json
import sys
import urllib.request
from typing import Any

import xllamacpp


def serve(file: str) -> xllamacpp.Server:
    """The file on one CPU thread, with a cache in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 256, 1, False, -1
    params.cpuparams.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def complete(server: xllamacpp.Server, prompt: list[int], forced: int, **more: Any) -> dict[str, Any]:
    """A completion whose every token is `forced`; the log-probabilities are those before it was."""
    request = {"prompt": prompt, "temperature": 0.0, "cache_prompt": False, "logit_bias": [[forced, 1000.0]]} | more
    return server.handle_completions(request)["choices"][0]


def logprobs(server: xllamacpp.Server, prompt: list[int], vocab_size: int) -> list[float]:
    # A token that is half a character would be reported without its probabilities: an "A" is forced.
    choice = complete(server, prompt, 65, n_predict=1, n_probs=vocab_size)
    by_id = {entry["id"]: entry["logprob"] for entry in choice["logprobs"]["content"][0]["top_logprobs"]}
    return [by_id[token] for token in range(vocab_size)]


def tokenize(server: xllamacpp.Server, text: str) -> list[int]:
    body = json.dumps({"content": text, "add_special": True, "parse_special": True}).encode()
    request = urllib.request.Request(f"{server.listening_address}/tokenize", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["tokens"]


def main() -> None:
    question = json.load(sys.stdin)
    server = serve(question["file"])
    result = {
        "logprobs": [logprobs(server, prompt, question["vocab_size"]) for prompt in question.get("prompts", ())],
        "tokens": [tokenize(server, text) for text in question.get("texts", ())],
        "stops": [
            token
            for token in question.get("may_stop", ())
            if complete(server, [65], token, n_predict=3)["finish_reason"] == "stop"
        ],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
