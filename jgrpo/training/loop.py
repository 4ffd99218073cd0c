"""The training loop: prompts, rollout, rewards, advantages, update, evaluation, log, checkpoint.

A step is a function of (state, step number): its prompts follow from the cursor, its random numbers from
`fold_in(key, step)`. A run killed anywhere and resumed from its last checkpoint therefore repeats the lost steps bit for
bit. A signal lets the phase in progress finish. After a rollout or its rewards the state is still that of the step
before: that is saved, and the rollout thrown away. After an update the step is completed (evaluation and log), so that
a resumed run has every line that an uninterrupted one has.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp

from jgrpo.algorithms import check_objective, objective_from_config
from jgrpo.checkpoints.adapter import export_adapter, replace_by_adapter, start_adapter
from jgrpo.checkpoints.hf import eos_ids, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.config import TrainConfig
from jgrpo.data import Cursor, Example, take
from jgrpo.reporting import FRESH, Reporter, is_due, make_reporter, memory_metrics
from jgrpo.rollout import EnvironmentFactory, Rollout, environment_factory
from jgrpo.training import evaluation
from jgrpo.training.experience import Experience, advantages_of, completion_rows, host_metrics, judge, weights_of
from jgrpo.training.guards import CompileCounter, StopSignals, check_finite, check_first_rollout
from jgrpo.training.optimizer import make_optimizer
from jgrpo.training.policy import Policy, load_policy
from jgrpo.training.run_directory import ADAPTER, CHECKPOINTS, check_directory, claim_directory
from jgrpo.training.state import Batch, TrainState
from jgrpo.training.step import grpo_step
from jgrpo.training.task import RewardFunctions, Task, load_task

WARM_STEPS = 2
"""Steps of a process that may compile."""


class Stopped(SystemExit):
    """A signal ended the run after its state was saved; the code is 128 + signal."""


def train(
    config: TrainConfig, reward_functions: RewardFunctions = (), environment: EnvironmentFactory | None = None
) -> TrainState:
    """Train an adapter as configured, and leave the run directory behind.

    Args:
        config: validated settings (`jgrpo.cli.resolve_config` makes them from Python).
        reward_functions: Python functions of TRL's signature, used instead of the names in the configuration.
        environment: makes what answers the model's turns (`jgrpo.rollout.Environment`), instead of the configuration's.

    Returns:
        The final state.

    Raises:
        UserError: bad input.
        Stopped: SIGTERM or SIGINT came; everything is saved.
    """
    with StopSignals() as signals:
        check_objective(config.algorithm)
        config = check_directory(replace_by_adapter(config))
        reporter = make_reporter(config)
        # Everything that can be wrong is looked at before the weights, which take longest.
        path = resolve_checkpoint(config.model.model, config.model.revision)
        context, tokenizer = load_model_config(path).max_position_embeddings, load_tokenizer(path)
        task = load_task(config, tokenizer, context, reward_functions)
        environment = environment or environment_factory(config.rollout, tokenizer, eos_ids(path, tokenizer))
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        policy = load_policy(config.model, config.quantization, config.lora, tokenizer, longest)
        config = dataclasses.replace(config, quantization=policy.quantization)
        policy = dataclasses.replace(policy, environment=environment)
        claim_directory(config)
        run = Run(config, policy, task, reporter, signals)
        try:
            return run.train()
        finally:
            run.close()


class Run:
    """One run of the loop: what is fixed, and the state that changes.

    Attributes:
        state: after the last finished step.
        num_tokens: prompt and completion tokens trained on so far.
    """

    def __init__(self, config: TrainConfig, policy: Policy, task: Task, reporter: Reporter, signals: StopSignals):
        self.config, self.policy, self.task, self.reporter, self.signals = config, policy, task, reporter, signals
        self.directory = Path(config.run.output_dir)
        self.objective = objective_from_config(config.algorithm)
        updates = config.training.steps * config.algorithm.num_iterations * config.algorithm.num_minibatches
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.checkpoints = Checkpoints(self.directory / CHECKPOINTS, config.run.keep_last)
        self.compilations = CompileCounter()
        init_key, run_key, self.evaluation_key = jax.random.split(jax.random.key(config.training.seed), 3)
        lora = start_adapter(init_key, config.lora, policy.model.config)
        self.state = TrainState.create(lora, self.optimizer, run_key)
        self.num_tokens = 0
        self.steps_here = 0
        self.summary = "stopped by an error"

    def train(self) -> TrainState:
        """Every step that is left, then the exports."""
        restored = self._restore()
        self.reporter.start(self.config, self._plan(), FRESH if restored is None else restored)
        try:
            if restored is None:
                self._before_training()
            for step in range(int(self.state.step) + 1, self.config.training.steps + 1):
                self._step(step)
                self._stop_if_asked()
        except Stopped:
            self.summary = f"stopped by a signal after step {int(self.state.step)}; continue with --resume"
            self._save()
            raise
        self._save()
        self._export()
        self.summary = f"done: {int(self.state.step)} steps; the adapter is in {self.directory / ADAPTER}"
        return self.state

    def close(self) -> None:
        """Write what the reporter still holds and stop listening."""
        self.reporter.finish(self.summary)
        self.checkpoints.close()
        self.compilations.close()

    def _before_training(self) -> None:
        """The evaluation of step 0. It comes before the first chance to stop: a saved state has its line in the log."""
        if self.task.held_out is not None:
            self.reporter.log(0, self._evaluate())
        self._stop_if_asked()

    def _step(self, step: int) -> None:
        times: dict[str, float] = {}
        compiled = self.compilations.count
        began = time.perf_counter()
        examples, cursor = self._next_prompts()
        with _timed(times, "rollout"):
            rollout = jax.block_until_ready(self._rollout(examples, step))
        if self.config.rollout.compaction:  # its few smaller programs are compiled when a batch first gets there
            compiled = self.compilations.count
        self._stop_if_asked()
        if step == 1:
            check_first_rollout(self.policy, self.state.lora, rollout, self.config)
        with _timed(times, "reward"):
            experience, batch, reward_metrics = self._judge(rollout, examples, step)
        self._stop_if_asked()
        with _timed(times, "update"):
            metrics = self._update(batch, cursor)
        self._check_compilations(step, self.compilations.count - compiled)
        times["step"] = time.perf_counter() - began
        progress = {"epoch": cursor.epoch + cursor.index / len(self.task.prompts)}
        values = {**progress, **reward_metrics, **metrics, **self._throughput(experience, times), **memory_metrics()}
        self._report(step, values, experience, batch)
        check_finite(int(self.state.nonfinite), self.config.training.max_nonfinite_steps, step)
        if self.config.run.save_every and step % self.config.run.save_every == 0:
            self._save()

    def _throughput(self, experience: Experience, times: Mapping[str, float]) -> dict[str, float]:
        completions = int(experience.lengths.sum())
        prompts = experience.lengths.shape[1] * sum(len(example.token_ids) for example in experience.examples)
        self.num_tokens += prompts + completions
        return {
            "num_tokens": self.num_tokens,
            "step_time": times["step"],
            **{f"time/{phase}": times[phase] for phase in ("rollout", "reward", "update")},
            "throughput/rollout_tokens_per_s": completions / times["rollout"],
            "throughput/train_tokens_per_s": (prompts + completions) / times["update"],
        }

    def _next_prompts(self) -> tuple[list[Example], Cursor]:
        prompts, training = self.task.prompts, self.config.training
        cursor = Cursor(*(int(part) for part in jax.device_get(self.state.cursor)))
        rows, after = take(len(prompts), training.seed, cursor, training.prompts_per_step)
        return [prompts.example(row) for row in rows], after

    def _rollout(self, examples: Sequence[Example], step: int) -> Rollout:
        key = jax.random.fold_in(self.state.key, step)
        return self.policy.sample(self.state.lora, examples, key, self.config.rollout, self.task.prompt_width)

    def _judge(
        self, rollout: Rollout, examples: Sequence[Example], step: int
    ) -> tuple[Experience, Batch, dict[str, Any]]:
        progress = SimpleNamespace(global_step=step, max_steps=self.config.training.steps)
        experience = judge(
            self.policy, rollout, examples, self.task.rewards, self.config.reward, {"trainer_state": progress}
        )
        for problem in experience.result.problems:
            self.reporter.warn(problem)
        weights = weights_of(self.task.rewards)
        batch, metrics = advantages_of(
            experience.rewards_per_function, weights, rollout, objective=self.objective, names=self.task.reward_names
        )
        return experience, batch, {**host_metrics(metrics), **experience.result.metrics}

    def _update(self, batch: Batch, cursor: Cursor) -> dict[str, float]:
        state, metrics = grpo_step(
            self.state,
            self.policy.base,
            batch,
            model=self.policy.model,
            optimizer=self.optimizer,
            config=self._step_config,
            objective=self.objective,
        )
        self.state = state.replace(cursor=jnp.asarray(cursor, jnp.int32))
        return host_metrics(metrics)

    @property
    def _step_config(self) -> TrainConfig:
        """The settings without the run's directory, which is no reason to compile again."""
        return dataclasses.replace(self.config, run=type(self.config.run)())

    def _report(self, step: int, values: dict[str, Any], experience: Experience, batch: Batch) -> None:
        steps, logging, every = self.config.training.steps, self.config.reporting, self.config.evaluation.eval_every
        if is_due(step, logging.log_completions_every, steps):
            rows = completion_rows(self.policy, experience, batch.advantages, self.task.reward_names)
            self.reporter.completions(step, rows)
        if self.task.held_out is not None and (step == steps or step % every == 0):
            values |= self._evaluate()
        self.reporter.log(step, values)

    def _evaluate(self) -> dict[str, float]:
        config, began = self.config, time.perf_counter()
        assert self.task.held_out is not None
        scores = evaluation.evaluate_policy(
            self.policy,
            self.state.lora,
            self.task.held_out,
            self.task.rewards,
            self.evaluation_key,
            sampling=evaluation.held_out_sampling(config.rollout, config.evaluation.eval_temperature),
            reward_config=config.reward,
            prompt_width=self.task.prompt_width,
            batch_size=evaluation.evaluation_batch(
                config.training.prompts_per_step, config.rollout, self.task.prompt_width
            ),
        )
        metrics = evaluation.evaluation_metrics(scores, self.task.reward_names)
        return {**metrics, "time/evaluation": time.perf_counter() - began}

    def _stop_if_asked(self) -> None:
        if self.signals.received is not None:
            raise Stopped(self.signals.exit_code)

    def _check_compilations(self, step: int, count: int) -> None:
        self.steps_here += 1
        if self.steps_here > WARM_STEPS and count:
            self.reporter.warn(f"step {step} compiled {count} programs; shapes should be fixed after the first steps")

    def _save(self) -> None:
        rest = dataclasses.replace(self.state, lora={})
        self.checkpoints.save(int(self.state.step), self.state.lora, rest, {"num_tokens": self.num_tokens})

    def _restore(self) -> int | None:
        """Load the newest checkpoint of a resumed run; returns its step, None if there is nothing to load."""
        if not self.config.run.resume or self.checkpoints.latest_step is None:
            return None
        lora, rest, meta = self.checkpoints.restore(self.state.lora, dataclasses.replace(self.state, lora={}))
        self.state, self.num_tokens = rest.replace(lora=lora), meta["num_tokens"]
        return int(self.state.step)

    def _export(self) -> None:
        model, lora = self.config.model.model, self.state.lora
        export_adapter(self.directory / ADAPTER, lora, self.config.lora, self.policy.model.config, model, replace=True)

    def _plan(self) -> list[str]:
        return [*self.policy.describe(), *self.task.describe()]


@contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times[phase] = time.perf_counter() - began
