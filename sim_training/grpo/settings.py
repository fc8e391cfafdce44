"""Every knob of reinforcement learning, with the recipe's value as its default. No torch, no verl.

The recipe is SimpleVLA-RL's (its LIBERO and RoboTwin scripts); sizes are those of a small machine.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Annotated, Literal

from msgspec import Meta

from simplevla.config import Config
from simplevla.embodiment import Positive
from simplevla.errors import MissingExtraError

Count = Annotated[int, Meta(ge=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

PolicyLoss = Literal[
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "cispo",
]
Aggregation = Literal[
    "seq-mean-token-mean", "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]
Tracker = Literal["console", "tensorboard", "wandb", "swanlab", "mlflow", "trackio", "clearml", "file"]


class Exploration(Config, frozen=True, kw_only=True):
    """How the tokens of an attempt stray from what the policy thinks likeliest: together, or each alone.

    Every token is drawn from its own distribution either way, so that log-probabilities and losses are
    those of the recipe. Shared noise adds up over an attempt where independent noise cancels out: the same
    temperature reaches farther, and the outcome tells in which direction. To first order the expected
    update is the policy gradient averaged over the tokens that share their noise (Stein's identity: the
    mean of outcome times noise is covariance times gradient). Continuous control knows such exploration
    as pink noise and gSDE (Eberhard et al. 2023, Raffin et al. 2022); SimpleVLA-RL draws each token alone.

    Attributes:
        attempt: share of the noise's variance that all tokens of a dimension have in common in an attempt.
        chunk: share that those of one chunk have in common beyond that.
    """

    attempt: Share = 0.0
    chunk: Share = 0.0

    def __post_init__(self) -> None:
        if self.attempt + self.chunk > 1:
            raise ValueError("attempt and chunk must not exceed 1 together")

    @property
    def coherent(self) -> bool:
        """Whether anything is shared."""
        return self.attempt + self.chunk > 0


class SamplingSettings(Config, frozen=True, kw_only=True):
    """Which episodes are played, and which of them are learned from.

    Attributes:
        group_size: episodes from one initial state.
        groups: groups of one update.
        round_groups: groups sampled at once; 0 for as many as ``groups``.
        rounds: how often at most to sample in one iteration until ``groups`` are worth learning from.
        temperature: the logits are divided by it, for sampling and for the update alike.
        final_temperature: where the temperature goes, in a straight line over the iterations; 0 to
            leave it where it is.
        exploration: what the tokens of an attempt have in common when they stray.
        dynamic: keep only groups whose accuracy is within ``accuracy_low`` and ``accuracy_high``.
        keep_surplus: groups beyond what an update takes wait for the next one.
        retry_unanimous: a group that failed altogether is sampled once more, later, and counts as one
            group of twice the size: what it took to fail is not thrown away.
        oldest: iterations that a group may wait for its update.
        curriculum: draw initial states from a region in proportion to p (1 - p) of its recent success
            p; off, all are equally likely.
        curriculum_memory: share of its past that a region's success keeps each iteration.
        horizon: actions that an episode may take; 0 for the task's own limit.
        final_horizon: where the horizon goes, in a straight line over the iterations; 0 to leave it
            where it is. Less and less time rewards the quickest way alone.
    """

    group_size: Annotated[int, Meta(ge=2, le=256)] = 8
    groups: Count = 64
    round_groups: Annotated[int, Meta(ge=0)] = 0
    rounds: Count = 1
    temperature: Positive = 1.6
    final_temperature: NotNegative = 0.0
    exploration: Exploration = Exploration()
    dynamic: bool = True
    accuracy_low: Share = 0.1
    accuracy_high: Share = 0.9
    keep_surplus: bool = True
    retry_unanimous: bool = False
    oldest: Count = 2
    curriculum: bool = False
    curriculum_memory: Share = 0.8
    horizon: Annotated[int, Meta(ge=0)] = 0
    final_horizon: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.accuracy_low > self.accuracy_high:
            raise ValueError("accuracy_low must not be above accuracy_high")
        if self.final_horizon and not self.horizon:
            raise ValueError("final_horizon needs a horizon to start from")

    @property
    def sampled_groups(self) -> int:
        """Groups of one round."""
        return self.round_groups or self.groups


class UpdateSettings(Config, frozen=True, kw_only=True):
    """How the policy learns from the groups.

    Attributes:
        policy_loss: verl's name of the loss; "vanilla" is PPO's clipped objective.
        loss_aggregation: verl's name of how token losses become one number.
        clip_low, clip_high: the ratio of probabilities is clipped to 1 - low .. 1 + high.
        normalise: divide advantages by the group's standard deviation (GRPO), or not (Dr. GRPO).
        learning_rate: at the start.
        decay: whether it falls to zero along half a cosine over the iterations.
        warmup: iterations of linear rise of the learning rate.
        mini_batch: trajectories of one optimizer step.
        micro_batch: trajectories that one worker computes at once; a divisor of its share of the
            mini-batch.
        epochs: how often each trajectory is used in one update.
        rollout_correction: weigh tokens ("token") or trajectories ("sequence") that an older policy
            sampled by truncated importance, as verl does; "off" takes them as they are.
        correction_limit: where the importance is truncated.
        kl: weight of the divergence from the policy at the start; above 0 a copy of it is kept.
        entropy: weight of the entropy bonus.
        train_encoder: learn the image encoder too. Off, what it sees is computed once a look while
            playing, and updates run the decoder alone.
        precision: what weights are computed in; the optimizer's own copy is always fp32.
        gradient_checkpointing: recompute activations instead of keeping them, for large networks.
        defer_gradients: learners exchange gradients once a mini-batch; off, after each micro-batch, which
            spares each of them a whole gradient: off for large networks.
        parameter_offload, optimizer_offload: keep shards in the host's memory between uses.
    """

    policy_loss: PolicyLoss = "vanilla"
    loss_aggregation: Aggregation = "seq-mean-token-mean"
    clip_low: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.28
    normalise: bool = True
    learning_rate: Positive = 5e-6
    decay: bool = False
    warmup: Annotated[int, Meta(ge=0)] = 0
    weight_decay: NotNegative = 0.01
    gradient_clip: Positive = 1.0
    mini_batch: Count = 128
    micro_batch: Count = 8
    epochs: Count = 1
    rollout_correction: Literal["off", "token", "sequence"] = "off"
    correction_limit: Positive = 2.0
    kl: NotNegative = 0.0
    entropy: NotNegative = 0.0
    train_encoder: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    gradient_checkpointing: bool = False
    defer_gradients: bool = True
    parameter_offload: bool = False
    optimizer_offload: bool = False

    def __post_init__(self) -> None:
        if self.mini_batch % self.micro_batch:
            raise ValueError("mini_batch must be a multiple of micro_batch")


class PlacementSettings(Config, frozen=True, kw_only=True):
    """On what it runs.

    Attributes:
        engine: "local" learns in this process, "ray" in worker processes under Ray.
        learners: worker processes that learn together (FSDP2), one a GPU; 1 if the engine is local.
        actors: worker processes that only act. 0 is colocated: the learners act, too, each with a copy
            of the whole network. Above 0 is disaggregated: each gets the weights after every update.
        environment_workers: processes that simulate.
        slots: environments of each of them.
        threads: torch's threads of each learner and actor.
        gpu: whether each learner and actor takes one GPU.
        nodes: hosts that the learners are spread over evenly.
        ray_address: of a cluster that runs already ("auto" for one on this host); empty to start one
            that listens on the loopback interface alone.
        restarts: how often a run goes on by itself after a process has died.
    """

    engine: Literal["local", "ray"] = "local"
    learners: Count = 1
    actors: Annotated[int, Meta(ge=0)] = 0
    environment_workers: Count = 1
    slots: Count = 4
    threads: Annotated[int, Meta(ge=1, le=256)] = 1
    gpu: bool = False
    nodes: Count = 1
    ray_address: str = ""
    restarts: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.learners % self.nodes:
            raise ValueError("learners must be a multiple of nodes")
        if self.engine == "local" and (self.learners != 1 or self.actors):
            raise ValueError("a local engine has one learner and no actors: choose engine: ray")


class GrpoSettings(Config, frozen=True, kw_only=True):
    """Reinforcement learning from outcomes, whole.

    Attributes:
        iterations: how many times to sample, and update.
        evaluate_every: iterations between greedy evaluations; 0 for none.
        evaluation_episodes: of each, on seeds that neither training nor the final evaluation uses.
        save_every: iterations between checkpoints.
        deliver: the policy that comes out: the "last", or the "best" in a greedy evaluation.
        tracking: where verl sends the curves. Those after "tensorboard" need their own library.
        seed: of everything that is drawn.
    """

    iterations: Count
    sampling: SamplingSettings = SamplingSettings()
    update: UpdateSettings = UpdateSettings()
    placement: PlacementSettings = PlacementSettings()
    evaluate_every: Annotated[int, Meta(ge=0)] = 10
    evaluation_episodes: Count = 64
    save_every: Count = 1
    deliver: Literal["last", "best"] = "last"
    tracking: tuple[Tracker, ...] = ("tensorboard",)
    seed: Annotated[int, Meta(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.update.mini_batch % (self.update.micro_batch * self.placement.learners):
            raise ValueError("mini_batch must be a multiple of micro_batch times learners")
        if self.deliver == "best" and not self.evaluate_every:
            raise ValueError("to deliver the best policy, evaluate_every must not be 0")

    def learning_rate(self, iteration: int) -> float:
        """Return the learning rate of an iteration."""
        update = self.update
        if iteration < update.warmup:
            return update.learning_rate * (iteration + 1) / update.warmup
        if not update.decay:
            return update.learning_rate
        done = (iteration - update.warmup) / max(self.iterations - update.warmup, 1)
        return update.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    def temperature(self, iteration: int) -> float:
        """Return the temperature of an iteration."""
        return self._moved(self.sampling.temperature, self.sampling.final_temperature, iteration)

    def horizon(self, iteration: int) -> int:
        """Return how many actions an episode of an iteration may take; 0 for the task's own limit."""
        return round(self._moved(self.sampling.horizon, self.sampling.final_horizon, iteration))

    def _moved(self, start: float, end: float, iteration: int) -> float:
        if not end or self.iterations == 1:
            return start
        return start + (end - start) * min(iteration / (self.iterations - 1), 1.0)


def require_libraries() -> None:
    """Check that what trains is installed.

    Raises:
        MissingExtraError: verl is not.
    """
    if find_spec("verl") is None:
        raise MissingExtraError("verl", "train")
