"""What goes into a rollout and what comes out: `Prompts` and `Rollout`, frozen pytrees of fixed shapes."""

import flax.struct
from jax import Array
from jaxtyping import Bool, Float32, Int32

FINISH_STOP = 0
"""The completion ended with a stop token."""
FINISH_LENGTH = 1
"""The completion reached the length limit."""


@flax.struct.dataclass
class Prompts:
    """Tokenized questions of one batch, of different lengths."""

    tokens: Int32[Array, "Q P"]
    """Right-padded; the padding may be any valid id."""
    lengths: Int32[Array, " Q"]
    """Tokens of each prompt, at least 1."""


@flax.struct.dataclass
class Rollout:
    """G completions of each of Q questions, with the log-probabilities they were drawn with."""

    prompt_tokens: Int32[Array, "Q P"]
    """As given, right-padded."""
    prompt_lengths: Int32[Array, " Q"]
    """Tokens of each prompt."""
    completion_tokens: Int32[Array, "Q G C"]
    """Drawn tokens, the stop token included; the pad id after the end."""
    completion_lengths: Int32[Array, "Q G"]
    """Tokens of each completion, the stop token included."""
    completion_mask: Bool[Array, "Q G C"]
    """True on the completion's tokens, the first stop token included. Built by the sampler while it draws and never
    from token ids, since the pad id may be a stop id."""
    logprobs: Float32[Array, "Q G C"]
    """Log-probability of each token under the distribution it was drawn from (temperature, truncated,
    renormalised); 0 outside the mask."""
    log_kept: Float32[Array, "Q G C"]
    """Log of the probability mass that top-k, top-p and min-p kept; 0 without them and outside the mask."""
    finish: Int32[Array, "Q G"]
    """FINISH_STOP or FINISH_LENGTH."""
    loss_mask: Bool[Array, "Q G C"] | None = None
    """True on the tokens that the model wrote; False on those of a tool or an environment, whose log-probabilities are 0
    here. None: the model wrote everything."""

    @property
    def policy_mask(self) -> Bool[Array, "Q G C"]:
        """The completion's tokens that the model wrote: what a loss is about."""
        return self.completion_mask if self.loss_mask is None else self.completion_mask & self.loss_mask

    @property
    def policy_logprobs(self) -> Float32[Array, "Q G C"]:
        """log-softmax(logits / temperature) of each token, over the whole vocabulary: the trainer's number.

        A trainer that keeps the truncated support fixed subtracts `log_kept` from its own log-probabilities. In the
        ratio of two policies on one rollout it cancels, so losses need neither field.
        """
        return self.logprobs + self.log_kept
