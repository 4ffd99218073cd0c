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
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from jgrpo.algorithms import check_objective, combine_rewards, objective_from_config
from jgrpo.checkpoints.adapter import replace_by_adapter
from jgrpo.checkpoints.hf import eos_ids, load_model_config, load_tokenizer, resolve_checkpoint
from jgrpo.checkpoints.train_state import Checkpoints
from jgrpo.config import TrainConfig
from jgrpo.data import Cursor, Example, take
from jgrpo.reporting import FRESH, Reporter, is_due, make_reporter, memory_metrics
from jgrpo.rollout import EnvironmentFactory, Rollout, environment_factory
from jgrpo.rollout.weights import at_once, describe_weights
from jgrpo.training import evaluation
from jgrpo.training.algorithms import ALGORITHMS
from jgrpo.training.compiled_memory import batch_shapes, check_compiled, device_limits
from jgrpo.training.controllers import coefficient_metrics, initial_coefficients, next_coefficients
from jgrpo.training.experience import Experience, advantages_of, completion_rows, host_metrics, judge, weights_of
from jgrpo.training.filters import Judged, choose, judged, sample_until_informative, sampling_effort
from jgrpo.training.fitting import check_memory
from jgrpo.training.guards import CompileCounter, StopSignals, check_finite, check_first_rollout
from jgrpo.training.optimizer import make_optimizer
from jgrpo.training.policy import Policy, compute_dtype, load_policy
from jgrpo.training.reference import completion_kl, describe_reference, initial_reference, synced
from jgrpo.training.run_directory import CHECKPOINTS, check_directory, claim_directory
from jgrpo.training.state import Batch, TrainState, committed
from jgrpo.training.task import RewardFunctions, Task, load_task
from jgrpo.training.trained import export_trained, keeps_start, loaded_dtype, outcome, shapes_of, starting_point

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
        shape, tokenizer = load_model_config(path), load_tokenizer(path)
        task = load_task(config, tokenizer, shape.max_position_embeddings, reward_functions)
        check_memory(config, shape, compute_dtype(config.model), task.prompt_width, Console(stderr=True))
        environment = environment or environment_factory(config.rollout, tokenizer, eos_ids(path, tokenizer))
        longest = config.data.max_prompt_length + config.rollout.max_completion_length
        stored = loaded_dtype(config.lora, compute_dtype(config.model))
        policy = load_policy(config.model, config.quantization, config.lora, tokenizer, longest, stored=stored)
        config = dataclasses.replace(config, quantization=policy.quantization)
        policy = dataclasses.replace(policy, environment=environment)
        run = Run(config, policy, task, reporter, signals)
        try:
            run.check_memory(Console(stderr=True))
            claim_directory(config)
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
        self.algorithm = ALGORITHMS[config.algorithm.algorithm]
        updates = config.training.steps * config.algorithm.num_iterations * config.algorithm.num_minibatches
        self.optimizer = make_optimizer(config.optimizer, updates)
        self.checkpoints = Checkpoints(self.directory / CHECKPOINTS, config.run.keep_last)
        self.compilations = CompileCounter()
        init_key, run_key, self.evaluation_key = jax.random.split(jax.random.key(config.training.seed), 3)
        self.state = self._fresh_state(init_key, run_key)
        self.num_tokens = 0
        self.steps_here = 0
        self.summary = "stopped by an error"

    def _fresh_state(self, init_key: jax.Array, run_key: jax.Array) -> TrainState:
        config, model_config = self.config, self.policy.model.config
        self.policy, lora = starting_point(init_key, config.lora, self.policy, keeps_start(config.algorithm))
        make_critic = self.algorithm.init_critic
        critic = make_critic(jax.random.fold_in(init_key, 1), config.lora, model_config) if make_critic else {}
        state = TrainState.create(lora, self.optimizer, run_key, critic)
        reference = initial_reference(config, model_config, lora)
        return committed(state.replace(reference=reference, coefficients=initial_coefficients(config.algorithm)))

    def check_memory(self, console: Console) -> None:
        """Compile the first programs of a step and refuse a run that they cannot be run in; nothing, where memory is not stated.

        Raises:
            UserError: see `check_compiled`.
        """
        if (limits := device_limits()) is None:
            return
        config, width, rollout = self.config, self.task.prompt_width, None
        if self.policy.environment is None:
            key, questions = jax.random.fold_in(self.state.key, 1), config.training.prompts_per_step
            rollout = self.policy.lower_sample(self.state.lora, questions, key, config.rollout, width)
        batch = batch_shapes(config, width, self.policy.environment is not None)
        update = self.algorithm.step.lower(self.state, self.policy.base, batch, **self._step_settings)
        check_compiled(config, self.policy, width, rollout, update, limits, console)

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
        path = export_trained(self.directory, self.config, self.policy, self.state.lora)
        self.summary = f"done: {int(self.state.step)} steps; {outcome(path)}"
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
        drawn, cursor = self._sample(step, times)
        if self.policy.environment is not None:  # its rounds' few shapes are compiled when a batch first gets there
            compiled = self.compilations.count
        rollout, experience = choose(drawn)
        rollout = committed(rollout)
        batch, reward_metrics = self._advantages(rollout, experience, step, times)
        self._stop_if_asked()
        with _timed(times, "update"):
            metrics = self._update(batch, cursor, reward_metrics)
        self._check_compilations(step, self.compilations.count - compiled)
        times["step"] = time.perf_counter() - began
        progress = {"epoch": cursor.epoch + cursor.index / len(self.task.prompts)}
        values = {**progress, **reward_metrics, **metrics, **self._throughput(drawn, experience, times)}
        values |= memory_metrics()
        if self.config.algorithm.max_generation_batches > 1:
            values |= sampling_effort(drawn)
        self._report(step, values, experience, batch)
        check_finite(int(self.state.nonfinite), self.config.training.max_nonfinite_steps, step)
        if self.config.run.save_every and step % self.config.run.save_every == 0:
            self._save()

    def _throughput(
        self, drawn: Sequence[Judged], experience: Experience, times: Mapping[str, float]
    ) -> dict[str, float]:
        completions = int(experience.lengths.sum())
        generated = sum(int(batch.experience.lengths.sum()) for batch in drawn)
        prompts = experience.lengths.shape[1] * sum(len(example.token_ids) for example in experience.examples)
        self.num_tokens += prompts + completions
        return {
            "num_tokens": self.num_tokens,
            "step_time": times["step"],
            **{f"time/{phase}": times[phase] for phase in ("rollout", "reward", "update")},
            "throughput/rollout_tokens_per_s": generated / times["rollout"],
            "throughput/train_tokens_per_s": (prompts + completions) / times["update"],
        }

    def _sample(self, step: int, times: dict[str, float]) -> tuple[list[Judged], Cursor]:
        """One rollout with its rewards, or several where groups without signal are replaced; and the cursor behind them."""
        cursor = Cursor(*(int(part) for part in jax.device_get(self.state.cursor)))

        def sample(number: int) -> Judged:
            nonlocal cursor
            examples, cursor = self._next_prompts(cursor)
            with _timed(times, "rollout"):
                rollout = jax.block_until_ready(self._rollout(examples, step, number))
            self._stop_if_asked()
            if step == 1 and number == 0:
                check_first_rollout(self.policy, self.state.lora, rollout, self.config)
            with _timed(times, "reward"):
                experience = self._judge(rollout, examples, step)
            self._stop_if_asked()
            return judged(rollout, experience, weights_of(self.task.rewards))

        return sample_until_informative(sample, self.config.algorithm.max_generation_batches), cursor

    def _next_prompts(self, cursor: Cursor) -> tuple[list[Example], Cursor]:
        prompts, training = self.task.prompts, self.config.training
        rows, after = take(len(prompts), training.seed, cursor, training.prompts_per_step)
        return [prompts.example(row) for row in rows], after

    def _rollout(self, examples: Sequence[Example], step: int, number: int) -> Rollout:
        key = jax.random.fold_in(self.state.key, step)
        key = key if number == 0 else jax.random.fold_in(key, number)
        return self.policy.sample(self.state.lora, examples, key, self.config.rollout, self.task.prompt_width)

    def _judge(self, rollout: Rollout, examples: Sequence[Example], step: int) -> Experience:
        progress = SimpleNamespace(global_step=step, max_steps=self.config.training.steps)
        experience = judge(
            self.policy, rollout, examples, self.task.rewards, self.config.reward, {"trainer_state": progress}
        )
        for problem in experience.result.problems:
            self.reporter.warn(problem)
        return experience

    def _advantages(
        self, rollout: Rollout, experience: Experience, step: int, times: dict[str, float]
    ) -> tuple[Batch, dict[str, Any]]:
        """The batch to train on, with what its advantages need beyond the rewards: a KL, or greedy completions."""
        more, measured = {}, {}
        if self.algorithm.penalises(self.objective):
            model, state, config = self.policy.model, self.state, self._step_config
            given = (state.lora, state.reference, self.policy.base, rollout)
            kl, measured["kl"] = completion_kl(*given, model=model, config=config)
            more["penalty"] = state.coefficients.get("beta", self.objective.reward_beta) * kl
        if self.objective.needs_greedy:
            more["greedy_rewards"] = self._greedy_rewards(experience.examples, step, times)
        batch, metrics = advantages_of(
            experience.rewards_per_function,
            weights_of(self.task.rewards),
            rollout,
            objective=self.objective,
            names=self.task.reward_names,
            **more,
        )
        return batch, {**host_metrics({**metrics, **measured}), **experience.result.metrics}

    def _greedy_rewards(self, examples: Sequence[Example], step: int, times: dict[str, float]) -> jax.Array:
        sampling = evaluation.held_out_sampling(self.config.rollout, temperature=0.0)
        with _timed(times, "rollout"):
            key, width = self.state.key, self.task.prompt_width
            rollout = jax.block_until_ready(self.policy.sample(self.state.lora, examples, key, sampling, width))
        with _timed(times, "reward"):
            experience = self._judge(rollout, examples, step)
        given = experience.rewards_per_function, weights_of(self.task.rewards)
        return combine_rewards(*map(jnp.asarray, given))[:, 0]

    def _update(self, batch: Batch, cursor: Cursor, measured: Mapping[str, Any]) -> dict[str, float]:
        config, used = self.config.algorithm, self.state.coefficients
        shown = host_metrics(coefficient_metrics(used))
        state, metrics = self.algorithm.step(self.state, self.policy.base, committed(batch), **self._step_settings)
        following = next_coefficients(state.coefficients, {**measured, **metrics}, config, batch.rewards.size)
        state = state.replace(cursor=jnp.asarray(cursor, jnp.int32), coefficients=following)
        self.state = committed(synced(state, config.reference_sync_steps))
        return {**shown, **host_metrics(metrics)}

    @property
    def _step_settings(self) -> dict[str, Any]:
        """The static arguments of the step."""
        config = self._step_config
        return dict(model=self.policy.model, optimizer=self.optimizer, config=config, objective=self.objective)

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
        config, settings, began = self.config, self.config.evaluation, time.perf_counter()
        assert self.task.held_out is not None
        prompts = config.training.prompts_per_step
        sampling = evaluation.held_out_sampling(config.rollout, settings.eval_temperature, settings.eval_generations)
        batch = partial(
            evaluation.evaluation_batch,
            sampling=config.rollout,
            prompt_width=self.task.prompt_width,
            num_generations=settings.eval_generations,
        )
        scores = evaluation.evaluate_policy(
            self.policy,
            self.state.lora,
            self.task.held_out,
            self.task.rewards,
            self.evaluation_key,
            sampling=dataclasses.replace(sampling, prompts_at_once=batch(at_once(config.rollout, prompts))),
            reward_config=config.reward,
            prompt_width=self.task.prompt_width,
            batch_size=batch(prompts),
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
        # Only shapes are needed: what a fresh state holds makes room before the saved one is read.
        wanted = self.state = shapes_of(self.state)
        lora, rest, meta = self.checkpoints.restore(wanted.lora, dataclasses.replace(wanted, lora={}))
        self.state, self.num_tokens = committed(rest.replace(lora=lora)), meta["num_tokens"]
        return int(self.state.step)

    def _plan(self) -> list[str]:
        reference = describe_reference(self.config.algorithm, self.config.lora.is_full)
        algorithm = f"algorithm: {self.config.algorithm.algorithm}; {reference}"
        prompts = self.config.training.prompts_per_step, self.task.prompt_width
        policy, trained = self.policy, self.state.lora
        weights = describe_weights(policy.model, policy.base, trained, self.config.rollout, prompts)
        return [*policy.describe(trained), *self.task.describe(), algorithm, weights]


@contextmanager
def _timed(times: dict[str, float], phase: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    times[phase] = times.get(phase, 0.0) + time.perf_counter() - began
