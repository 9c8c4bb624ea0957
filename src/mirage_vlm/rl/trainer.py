"""GRPO on TRL's trainer, with rollouts of our engine.

TRL gives the loop, the advantages, the loss and most metrics. Through its hooks come

- the responses (`rollout_func`), with `env_mask` 0 where a position is no action of the policy, so that latents that
  are replayed or rolled out again bear neither loss nor KL;
- the log-probabilities (`_get_per_token_logps_and_entropies`), which TRL would compute from token ids alone.

A response travels through TRL's shuffling and splitting as a number, in a column of its own beside its token ids: that
is the whole of what TRL has no place for. The methods with a leading underscore are TRL's own, of version 1.16.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import RepeatSampler

from mirage_vlm.decoding import EngineConfig, GenerationConfig
from mirage_vlm.errors import MirageError
from mirage_vlm.modeling.encoding import Pictures
from mirage_vlm.rl.policy import Policy, WithoutAdapters
from mirage_vlm.rl.rewards import Reward
from mirage_vlm.rl.rollouts import Rollout, roll_out
from mirage_vlm.training.checkpoints import Checkpoints
from mirage_vlm.training.data import Examples, collate
from mirage_vlm.training.recipe import Recipe
from mirage_vlm.trajectory import Trajectory

if TYPE_CHECKING:
    from mirage_vlm.modeling.latent_vlm import LatentVLM

FAR = 0.1  # nats between a log-probability of the engine and the trainer's own that somebody should know of
ALIKE = 1e-6  # standard deviation of the rewards of a group below which nothing is learnt of it
SILENT = 10  # steps without a span after which a run that is to think says so again


class LatentGRPO(Checkpoints, GRPOTrainer):
    """`trl.GRPOTrainer` on responses with latent spans.

    Args:
        vlm: the model.
        recipe: of stage `grpo`.
        args: TRL's arguments; its `beta` must be 0, the recipe's `rl.kl` counts.
        examples: what is asked.
        rewards: by name, with their weights.
    """

    def __init__(
        self,
        vlm: LatentVLM,
        recipe: Recipe,
        args: GRPOConfig,
        examples: Sequence[Trajectory] | Examples,
        rewards: dict[str, tuple[Reward, float]],
        callbacks: list[TrainerCallback] | None = None,
    ):
        assert recipe.rl is not None and args.beta == 0
        self.take(vlm, recipe)
        self.rl, self.examples = recipe.rl, examples
        self.policy = policy_of(vlm, recipe)
        args.reward_weights = [weight for _, weight in rewards.values()]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You are using 'rollout_func'")
            super().__init__(
                model=self.policy,
                reward_funcs=[_named(name, reward) for name, (reward, _) in rewards.items()],
                args=args,
                train_dataset=Dataset.from_dict({"prompt": [str(i) for i in range(len(examples))]}),
                processing_class=vlm.tokenizer,
                rollout_func=self._roll_out,
                callbacks=callbacks,
            )
        if self.rl.kl > 0:
            self.beta = self.rl.kl
            self.ref_model = self.accelerator.prepare_model(self._reference().eval(), evaluation_mode=True)
        self._rollouts: list[Rollout] = []
        self._order: list[int] = []  # numbers of the rollouts that are being scored
        self._drawn_at, self._drawn = -1, 0
        self._spent = {"rollout": 0.0, "train": 0.0}  # seconds since the last log
        self._tokens = {"rollout": 0, "train": 0}  # of responses, in that time, of this process
        self._recorded = torch.zeros(0)  # [B, C] log-probabilities by the engine, NaN where no token was chosen
        self._entropy = [0.0, 0.0]  # summed over text tokens since the last log, and their number
        self._largest = 0.0  # difference between the engine's log-probabilities and the trainer's
        self._without = 0  # steps in a row in which no response thought

    def _reference(self) -> torch.nn.Module:
        """The model that the run starts from."""
        if self.recipe.model.lora is not None:
            return WithoutAdapters(self.policy)
        store, self.vlm.feature_store = self.vlm.feature_store, None
        first = copy.deepcopy(self.vlm).requires_grad_(False)
        self.vlm.feature_store = store
        return policy_of(first, self.recipe)

    # -- rollouts ----------------------------------------------------------------------------------------------

    def _roll_out(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's hook: responses to the prompts of this process, which it has repeated already."""
        began = time.perf_counter()
        rl, pad_id = self.rl, self.vlm.config.pad_id
        config = GenerationConfig(
            max_new_tokens=rl.max_new_tokens,
            temperature=rl.temperature,
            latent_noise=rl.latent_noise,
            spans=rl.spans if rl.spans in ("forced", "none") else "free",
            span_after=rl.span_after,
            evict_images=self.recipe.train.visibility == "evict",
        )
        asked: dict[str, Trajectory] = {}
        for prompt in prompts:
            if prompt not in asked:
                asked[prompt] = self.examples[int(prompt)]
        made = roll_out(self.vlm, [asked[p] for p in prompts], config, self._seeds(len(prompts)), EngineConfig())
        self._rollouts, self._order = made, list(range(len(made)))
        self._watch(made)
        self._spent["rollout"] += time.perf_counter() - began
        acts = rl.latents == "gaussian"
        return {
            "prompt_ids": [each.prompt for each in made],
            "completion_ids": [each.completion for each in made],
            "logprobs": [each.chances for each in made],
            "env_mask": [
                [int(chance is not None or (acts and token == pad_id)) for token, chance in zip(*pair, strict=True)]
                for pair in ((each.completion, each.chances) for each in made)
            ],
            "trajectory": [each.trajectory for each in made],
        }

    def _seeds(self, count: int) -> list[int]:
        """A seed for each response, from the run's own, the step, and the process alone: the same after a resume."""
        step = self.state.global_step
        self._drawn_at, self._drawn = step, self._drawn + 1 if step == self._drawn_at else 0
        place = ((self.recipe.train.seed * 1_000_003 + step) * 101 + self._drawn) * self.args.world_size
        first = (place + self.args.process_index) * count
        return list(range(first, first + count))

    def _watch(self, made: Sequence[Rollout]) -> None:
        """Metrics of what was decoded, over all processes."""
        spans = [each.trajectory.spans for each in made]
        norms = [float(each.latents.float().norm(dim=-1).sum()) for each in made]
        sums = torch.tensor(
            [
                len(made),
                sum(map(bool, spans)),
                sum(map(len, spans)),
                sum(len(each.latents) for each in made),
                sum(norms),
            ],
            dtype=torch.float64,
            device=self.accelerator.device,
        )
        count, thinking, opened, latents, norm = self.accelerator.reduce(sums, reduction="sum").tolist()
        self._note("latent_rate", thinking / count)
        self._note("spans", opened / count)
        self._note("latents", latents / count)
        self._note("latent_norm", norm / max(latents, 1))
        self._tokens["rollout"] += sum(len(each.completion) for each in made)
        if self.rl.spans == "required":
            self._insist(thinking > 0, int(count))

    def _insist(self, thought: bool, responses: int) -> None:
        """A run that is to think must not go on silently without.

        Raises:
            MirageError: no response of the first step thinks.
        """
        if not thought and self.state.global_step == 0:
            raise MirageError(
                f"rl.spans: none of {responses} responses opened a latent span, so nothing is learnt of them; train "
                "the model to think first (stage1, stage2), or set rl.spans to free"
            )
        self._without = 0 if thought else self._without + 1
        if self._without % SILENT == 1:
            warnings.warn(
                f"step {self.state.global_step}: no response has opened a latent span for {self._without} step(s)",
                stacklevel=2,
            )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """TRL's step, [responses of all processes, rewards], and how far the responses of a group are apart."""
        found = super()._calculate_rewards(*args, **kwargs)
        worth = (found * self.reward_weights.to(found.device)).nansum(dim=1)
        spread = worth.view(-1, self.num_generations).std(dim=1)
        self._note("group_std", float(spread.mean()))
        self._note("groups_without_signal", float((spread < ALIKE).float().mean()))
        return found

    # -- log-probabilities -------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        output["rollout"] = torch.arange(len(output["completion_ids"]), device=self.accelerator.device)
        return output

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        began = time.perf_counter()
        self._order = inputs["rollout"].tolist()
        padding = inputs["completion_mask"] == 0
        if self.rl.latents == "gaussian":  # a density has no record
            padding |= inputs["completion_ids"] == self.vlm.config.pad_id
        self._recorded = inputs["sampling_per_token_logps"].masked_fill(padding, torch.nan)
        loss = super()._compute_loss(model, inputs)
        self._tokens["train"] += int(inputs["completion_mask"].sum())
        self._spent["train"] += time.perf_counter() - began
        return loss

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        began, before = time.perf_counter(), sum(self._spent.values())
        loss = super().training_step(*args, **kwargs)
        self._spent["train"] += time.perf_counter() - began - (sum(self._spent.values()) - before)
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """TRL's step, for the rollouts in `_order`, with their latents in place.

        Returns:
            [B, C] log-probabilities, [B, C] entropies where asked for, and None.
        """
        likely: list[torch.Tensor] = []
        entropy: list[torch.Tensor] = []
        size = batch_size or len(self._order)
        for start in range(0, len(self._order), size):
            some = [self._rollouts[number] for number in self._order[start : start + size]]
            with self.accelerator.autocast():
                scores = model(**batch_of(some, self.vlm))
            begins = torch.tensor([len(each.prompt) for each in some], device=input_ids.device)
            at = begins.unsqueeze(1) + torch.arange(logits_to_keep, device=input_ids.device)  # [b, C]
            widest = scores[0].shape[1]
            there = at < widest
            for found, score in zip((likely, entropy), scores, strict=True):
                found.append(score.gather(1, at.clamp(max=widest - 1)) * there)
        logps = torch.cat(likely)
        if not compute_entropy:
            return logps, None, None
        self._observe(logps.detach(), torch.cat(entropy))
        return logps, torch.cat(entropy), None

    def _observe(self, logps: torch.Tensor, entropy: torch.Tensor) -> None:
        """Of the policy that is trained: its entropy, and how far it is from what the engine recorded.

        Raises:
            MirageError: its log-probabilities are not numbers.
        """
        text = ~self._recorded.isnan()
        self._entropy[0] += float(entropy[text].sum())
        self._entropy[1] += int(text.sum())
        updated = self._step // self.args.steps_per_generation % self.num_iterations > 0  # since the rollout
        if not bool(text.any()):
            return
        if not bool(logps[text].isfinite().all()):
            raise MirageError(
                f"step {self.state.global_step}: the policy's log-probabilities are not finite; the weights have gone "
                "out of bounds (lower the learning rate), or float16 is too narrow for them"
            )
        if not updated:
            self._largest = max(self._largest, float((logps - self._recorded)[text].abs().max()))

    # -- logs, and what is TRL's and not wanted ----------------------------------------------------------------

    def _note(self, name: str, value: float) -> None:
        self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add what the engine and the trainer came to since the last log."""
        if any(self._spent.values()) and "train_runtime" not in logs:
            sums = torch.tensor(
                [*self._entropy, *self._tokens.values()], dtype=torch.float64, device=self.accelerator.device
            )
            entropy, number, *tokens = self.accelerator.reduce(sums, reduction="sum").tolist()
            if number:
                self._note("text_entropy", entropy / number)
            if tokens[0]:  # there were rollouts
                largest = torch.tensor([self._largest], device=self.accelerator.device)
                apart = float(self.accelerator.gather(largest).max())
                self._note("rollout_logprob_max_abs_diff", apart)
                if apart > FAR:
                    warnings.warn(
                        f"step {self.state.global_step}: engine and trainer differ by {apart:.2f} nats on a token; in "
                        "half precision they round differently, and the ratio of probabilities is the trainer's alone",
                        stacklevel=2,
                    )
            for (part, seconds), count in zip(self._spent.items(), tokens, strict=True):
                if count:
                    self._note(f"{part}_seconds", seconds)
                    self._note(f"{part}_tokens_per_second", count / max(seconds, 1e-9))
            self._largest, self._entropy = 0.0, [0.0, 0.0]
            self._spent = dict.fromkeys(self._spent, 0.0)
            self._tokens = dict.fromkeys(self._tokens, 0)
        self.watch.without_skipped(logs)
        super().log(logs, start_time)

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        sampler = EpochSampler(
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=True,
            seed=self.args.seed,
        )
        sampler.set_epoch(0)
        return sampler

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A checkpoint is a checkpoint; cards are for people to write."""

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order for each epoch that is a function of seed and epoch, and so the same on resume."""

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed((self.seed or 0) * 1_000_003 + epoch)


def policy_of(vlm: LatentVLM, recipe: Recipe) -> Policy:
    """A model as the policy of a recipe."""
    rl = recipe.rl
    assert rl is not None
    return Policy(vlm, rl.latents, rl.temperature, rl.latent_noise, recipe.train.visibility, rl.spans != "none")


def batch_of(rollouts: Sequence[Rollout], vlm: LatentVLM) -> dict[str, Any]:
    """What `Policy` takes, on the model's device."""
    batch = collate([each.encoded for each in rollouts], vlm.encoder)
    different = {id(each.pictures): each.pictures for each in rollouts if each.pictures is not None}
    if (joined := Pictures.join(list(different.values()))) is not None:
        places = count()
        numbers = {key: [next(places) for _ in pictures.grid_thw] for key, pictures in different.items()}
        batch["shown"] = tuple(number for each in rollouts for number in numbers.get(id(each.pictures), ()))
        batch |= {"pixel_values": joined.pixel_values, "shown_thw": joined.grid_thw}
        if vlm.feature_store is not None:
            batch["picture_keys"] = joined.keys
    batch["vectors"] = torch.cat([each.latents for each in rollouts]).to(vlm.model.dtype)
    return {key: value.to(vlm.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _named(name: str, reward: Reward) -> Callable[..., list[float]]:
    """A reward as TRL calls one, under its name in the logs."""

    def called(trajectory: Sequence[Trajectory], **others: Any) -> list[float]:
        return list(reward(trajectory))

    called.__name__ = name
    return called
