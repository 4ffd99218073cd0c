"""The supervised loop: rows, update, evaluation, log, checkpoint.

The same promises as the loop of `jgrpo.training.loop`, made in the same way: a step is a function of (state, step number),
so a run that is killed and resumed repeats the lost steps bit for bit; a signal lets the update in progress finish, and
saves; a run directory has the same files (without completions), and its adapter is what `--adapter`, `generate`, `evaluate`
and `export` take.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jgrpo.checkpoints.adapter import replace_by_adapter
from jgrpo.checkpoints.hf import eos_ids as stop_ids
from jgrpo.checkpoints.hf import load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.data import Cursor
from jgrpo.data.packing import epoch_rows
from jgrpo.data.supervised import PackedRows, PairDataset, has_held_out_pairs, load_pairs, rows_of_pairs
from jgrpo.errors import UserError
from jgrpo.reporting import FRESH, make_reporter, memory_metrics
from jgrpo.sft_config import SftConfig
from jgrpo.training.experience import host_metrics
from jgrpo.training.forward import logprob_chunk
from jgrpo.training.guards import StopSignals, check_finite
from jgrpo.training.loop import Stopped
from jgrpo.training.optimizer import make_optimizer
from jgrpo.training.policy import Policy, compute_dtype, load_policy
from jgrpo.training.run_directory import CHECKPOINTS, check_directory, claim_directory
from jgrpo.training.sft_step import SupervisedBatch, sft_loss, sft_step
from jgrpo.training.state import TrainState, committed
from jgrpo.training.trained import export_trained, loaded_dtype, outcome, shapes_of, starting_point


def sft(config: SftConfig) -> TrainState:
    """Train an adapter to imitate completions, and leave the run directory behind.

    Args:
        config: validated settings (`jgrpo.validation.validate_supervised`).

    Raises:
        UserError: bad input.
        Stopped: SIGTERM or SIGINT came; everything is saved.
    """
    with StopSignals() as signals:
        config = check_directory(replace_by_adapter(config))
        path = resolve_checkpoint(config.model.model, config.model.revision)
        context, tokenizer = load_model_config(path).max_position_embeddings, load_tokenizer(path)
        if config.data.max_length > context:
            raise UserError(f"max_length {config.data.max_length} exceeds the model's context of {context} positions")
        ends, seed = stop_ids(path, tokenizer), config.training.seed
        pairs = load_pairs(config.data, tokenizer, ends, "train", seed)
        evaluates = config.evaluation.eval_every > 0 and has_held_out_pairs(config.data)
        held_out = load_pairs(config.data, tokenizer, ends, "test", seed) if evaluates else None
        stored = loaded_dtype(config.lora, compute_dtype(config.model))
        how = config.model, config.quantization, config.lora, tokenizer, config.data.max_length
        policy = load_policy(*how, stored=stored)
        config = dataclasses.replace(config, quantization=policy.quantization)
        claim_directory(config)
        run = SupervisedRun(config, policy, pairs, held_out, signals)
        try:
            return run.train()
        finally:
            run.close()


class SupervisedRun:
    """One run of the loop: what is fixed, and the state that changes.

    Attributes:
        state: after the last finished step.
        num_tokens: tokens trained on so far, prompts included.
    """

    def __init__(
        self,
        config: SftConfig,
        policy: Policy,
        pairs: PairDataset,
        held_out: PairDataset | None,
        signals: StopSignals,
    ):
        self.config, self.pairs, self.signals = config, pairs, signals
        self.held_out = None if held_out is None else held_out.pairs[: config.evaluation.eval_prompts]
        self.directory = Path(config.run.output_dir)
        self.optimizer = make_optimizer(config.optimizer, config.training.steps)
        self.checkpoints = Checkpoints(self.directory / CHECKPOINTS, config.run.keep_last)
        self.reporter = make_reporter(config)
        init_key, run_key = jax.random.split(jax.random.key(config.training.seed))
        self.policy, lora = starting_point(init_key, config.lora, policy, keep_start=False)
        self.state = TrainState.create(lora, self.optimizer, run_key)
        self.lengths = [len(pair) for pair in pairs.pairs]
        self._epoch: tuple[int, list[list[int]]] = (-1, [])
        self.num_tokens = 0
        self.summary = "stopped by an error"

    def train(self) -> TrainState:
        """Every step that is left, then the export."""
        restored, steps = self._restore(), self.config.training.steps
        self.reporter.start(self.config, self._plan(), FRESH if restored is None else restored)
        if restored is None and self.held_out is not None:
            self.reporter.log(0, self._evaluate())
        for step in range((restored or 0) + 1, steps + 1):
            self._step(step)
            if self.signals.received is not None:
                self._save(step)
                self.summary = f"stopped by a signal after step {step}; continue with --resume"
                raise Stopped(self.signals.exit_code)
        self._save(steps)
        path = export_trained(self.directory, self.config, self.policy, self.state.lora)
        self.summary = f"done: {steps} steps; {outcome(path)}"
        return self.state

    def close(self) -> None:
        """Write what the reporter still holds and stop listening."""
        self.reporter.finish(self.summary)
        self.checkpoints.close()

    def _step(self, step: int) -> None:
        config, began = self.config, time.perf_counter()
        groups, cursor = self._next_rows()
        rows = self._rows(self.pairs, groups)
        self.state, metrics = sft_step(
            self.state,
            self.policy.base,
            in_microbatches(rows, config.training.microbatch_rows),
            model=self.policy.model,
            optimizer=self.optimizer,
            remat=config.training.remat,
            chunk=logprob_chunk(self.policy.model, config.training.logprob_workspace),
        )
        self.state = committed(self.state.replace(cursor=jnp.asarray(cursor, jnp.int32)))
        values = host_metrics(metrics)
        seconds, tokens = time.perf_counter() - began, int(rows.lengths.sum())
        self.num_tokens += tokens
        values |= {
            "epoch": cursor.epoch + cursor.index / len(self._epoch_rows(cursor.epoch)),
            "num_tokens": self.num_tokens,
            "step_time": seconds,
            "time/update": seconds,
            "throughput/train_tokens_per_s": tokens / seconds,
            "packing/fill": tokens / rows.tokens.size,
            **memory_metrics(),
        }
        if self.held_out is not None and (step == config.training.steps or step % config.evaluation.eval_every == 0):
            values |= self._evaluate()
        self.reporter.log(step, values)
        check_finite(int(self.state.nonfinite), config.training.max_nonfinite_steps, step)
        if config.run.save_every and step % config.run.save_every == 0:
            self._save(step)

    def _next_rows(self) -> tuple[list[list[int]], Cursor]:
        """The next rows; a step may run over the end of an epoch."""
        epoch, index = (int(part) for part in jax.device_get(self.state.cursor))
        groups: list[list[int]] = []
        while len(groups) < self.config.training.rows_per_step:
            rows = self._epoch_rows(epoch)
            chunk = rows[index : index + self.config.training.rows_per_step - len(groups)]
            groups, index = groups + chunk, index + len(chunk)
            if index == len(rows):
                epoch, index = epoch + 1, 0
        return groups, Cursor(epoch, index)

    def _epoch_rows(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            data, seed = self.config.data, self.config.training.seed
            self._epoch = epoch, epoch_rows(self.lengths, data.max_length, seed, epoch, packing=data.packing)
        return self._epoch[1]

    def _rows(self, dataset: PairDataset, groups: list[list[int]]) -> PackedRows:
        pad_id = self.policy.tokenizer.pad_token_id
        return rows_of_pairs(dataset.pairs, groups, self.config.data.max_length, pad_id)

    def _evaluate(self) -> dict[str, float]:
        """Mean −ℓ over the completion tokens of the held-out examples."""
        assert self.held_out is not None
        began, size = time.perf_counter(), self.config.training.microbatch_rows
        dataset = PairDataset(self.held_out)
        groups = epoch_rows([len(p) for p in self.held_out], self.config.data.max_length, 0, 0)
        groups += [[] for _ in range(-len(groups) % size)]  # up to the one compiled shape
        batch = in_microbatches(self._rows(dataset, groups), size)
        total, count = 0.0, 0
        for index in range(batch.tokens.shape[0]):
            part = jax.tree.map(lambda array, i=index: array[i], batch)
            sums = sft_loss(
                self.state.lora,
                self.policy.base,
                part,
                model=self.policy.model,
                chunk=logprob_chunk(self.policy.model, self.config.training.logprob_workspace),
            )
            total, count = total + float(sums[0]), count + int(sums[1])
        return {"eval_loss": total / count, "time/evaluation": time.perf_counter() - began}

    def _save(self, step: int) -> None:
        rest = dataclasses.replace(self.state, lora={})
        self.checkpoints.save(step, self.state.lora, rest, {"num_tokens": self.num_tokens})

    def _restore(self) -> int | None:
        if not self.config.run.resume or self.checkpoints.latest_step is None:
            return None
        wanted = self.state = shapes_of(self.state)
        lora, rest, meta = self.checkpoints.restore(wanted.lora, dataclasses.replace(wanted, lora={}))
        self.state, self.num_tokens = committed(rest.replace(lora=lora)), meta["num_tokens"]
        return int(self.state.step)

    def _plan(self) -> list[str]:
        rows, tokens = self._epoch_rows(0), sum(self.lengths)
        dropped = f" ({self.pairs.dropped} too long, dropped)" if self.pairs.dropped else ""
        held_out = f"{len(self.held_out)} held out" if self.held_out else "no evaluation"
        fill = tokens / (len(rows) * self.config.data.max_length)
        return [
            *self.policy.describe(self.state.lora),
            f"data: {len(self.pairs)} examples{dropped}, {held_out}; {len(rows)} rows an epoch, {fill:.0%} filled",
        ]


def in_microbatches(rows: PackedRows, size: int) -> SupervisedBatch:
    """Rows cut into microbatches of `size`."""

    def cut(array: np.ndarray) -> Any:
        return array.reshape(-1, size, *array.shape[1:])

    return SupervisedBatch(*(cut(array) for array in (rows.tokens, rows.segments, rows.mask, rows.lengths)))
