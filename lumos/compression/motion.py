"""The motion loss for a pruned model of diffusers in the user's own training loop: a critic on features of the teacher.

A critic is trained beside the student. It judges the clips that follow from the predictions of student and teacher, after new
noise, by the features of the frozen teacher (motion content adversarial, arXiv 2411.18375):

    critic = MotionCritic(teacher)
    for batch in loader:
        found = compare(student, teacher, pairs, batch.inputs, num_frames=14)
        loss = ... + 0.1 * critic.loss(batch.inputs, found.prediction, found.target)
        ...                              # backward and the step of the student's optimizer
        critic.step()
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lumos.compression import unets
from lumos.compression.critic import Critic, critic_taps, time_of_noise, with_penalty
from lumos.compression.diffusers_calls import NetworkCalls
from lumos.compression.features import tapped_first
from lumos.compression.noising import MEAN, OF_CLASS, SCHEDULED, STD, Objective, with_noise
from lumos.errors import UserError
from lumos.training.adversarial import critic_losses, generator_losses
from lumos.training.auxiliary import without_gradient

BETAS = (0.0, 0.99)
"""The coefficients of Adam for the heads, as in SF-V (arXiv 2406.04324)."""
TEXT_WIDTH = ("caption_channels", "text_embed_dim", "text_dim", "cross_attention_dim")
"""Fields of configs that say how many channels the states of the prompt have; the first that a config has."""


class MotionCritic:
    """The heads of a critic with their optimizer, on a frozen U-Net or transformer of diffusers.

    heads      the network that is trained
    optimizer  Adam

    Args:
        teacher: the model that the student was made from, frozen and in eval mode.
        objective: what it predicts and from which levels of noise. None: `flow` or `edm` as usual for its class; models that
            predict noise or v need their schedule, `Objective("epsilon", kept=read_schedule(FOLDER))`.
        taps: blocks of a transformer behind which heads stand, in its first half; a U-Net has them behind each down block.
        width: channels of the heads, a multiple of 8.
        lr: learning rate of the heads, 10 times that of the student in SF-V.
        warmup: steps in which `loss` is 0 while the heads learn.
        gamma: weight of the penalty R1.
        kind: form of the student's loss, see `adversarial.generator_losses`.
        seed: of new heads and of the noise.

    Raises UserError for a class that is not supported, and for an objective that is missing.
    """

    def __init__(
        self, teacher: nn.Module, objective: Objective | None = None, *, taps: int = 4, width: int = 64, lr: float = 1e-4,
        warmup: int = 200, gamma: float = 0.0, kind: str = "hinge", seed: int = 0,
    ):  # fmt: skip
        self.teacher, self.calls = teacher, NetworkCalls(type(teacher).__name__.removeprefix(unets.PREFIX), teacher.config)
        if (usual := OF_CLASS.get(self.calls.name)) is None:
            raise UserError(f"a motion critic reads {', '.join(OF_CLASS)}, not {self.calls.name}")
        if objective is None and usual in SCHEDULED:
            raise UserError(
                f"{self.calls.name} needs the schedule of its noise: give Objective({usual!r}, kept=read_schedule(FOLDER)) with "
                "the folder of the pipeline's scheduler"
            )
        self.objective = objective or Objective(usual)
        blocks = self.calls.blocks()
        self.blocks = blocks if self.calls.is_unet else [blocks[i] for i in critic_taps(len(blocks), taps)]
        self.draws, self.steps = torch.Generator().manual_seed(seed), 0
        self.warmup, self.gamma, self.kind = warmup, gamma, kind
        text_width = next(found for name in TEXT_WIDTH if (found := teacher.config.get(name)) is not None)
        text_width = text_width[0] if isinstance(text_width, (tuple, list)) else text_width
        with torch.random.fork_rng(devices=[]):  # the user's own draws stay as they are
            torch.manual_seed(seed)
            self.heads = Critic([self.calls.channels(name) for name in self.blocks], text_width, width)
        self.heads.to(next(teacher.parameters()).device)
        self.optimizer = torch.optim.Adam(self.heads.parameters(), lr=lr, betas=BETAS)
        self._seen: tuple[list[Tensor], list[Tensor], Tensor, Tensor] | None = None

    def loss(self, inputs: Mapping[str, Any], prediction: Tensor, target: Tensor) -> Tensor:
        """Return the student's loss, a scalar whose gradient reaches `prediction` only; it keeps what `step` needs.

        Args:
            inputs: keyword arguments of both models, as for `recovery.compare`: noisy latents, time, conditions.
            prediction: what the student made of them, with gradient.
            target: what the teacher made of them.
        """
        noisy = self.calls.clips(inputs)[:, : self.calls.latents]
        level = self.objective.at(torch.as_tensor(inputs["timestep"], device=noisy.device).expand(len(noisy)))
        left = time_of_noise(torch.exp(MEAN + STD * torch.randn(len(noisy), generator=self.draws))).to(noisy.device)
        noise, new = torch.randn(noisy.shape, generator=self.draws).to(noisy.device), self.objective.near(left)

        def features(made: Tensor) -> list[Tensor]:
            clean = self.objective.clean(noisy.float(), self.calls.as_clips(made, noisy.shape).float(), level)
            with tapped_first(
                {name: self.teacher.get_submodule(name) for name in self.blocks},
                lambda output: self.calls.features(output, noisy.shape),
            ) as found:
                self.teacher(**self.calls.with_clips(inputs, with_noise(clean, noise, new), new.time), return_dict=False)
            return [found[name] for name in self.blocks]

        counts = self.steps >= self.warmup
        with torch.no_grad():
            real = features(target)
        with nullcontext() if counts else torch.no_grad():
            fake = features(prediction)
        pooled = inputs["encoder_hidden_states"].mean(1)
        self._seen = (real, [x.detach() for x in fake], left, pooled)
        if not counts:
            return prediction.new_zeros(())
        with without_gradient(self.heads):
            return generator_losses(self.heads(fake, left, pooled), self.kind).mean()

    def step(self) -> dict[str, float]:
        """Update the heads with the clips of the last `loss`; return the mean scores, {"real": D, "fake": D}.

        Raises UserError if `loss` was not called, and if the heads' loss is not finite; they are then as before.
        """
        if self._seen is None:
            raise UserError("MotionCritic.step follows MotionCritic.loss of the same clips")
        (real, fake, left, pooled), self._seen = self._seen, None
        with torch.enable_grad():
            of_real, penalty = with_penalty(self.heads, real, left, pooled, self.gamma)
            of_fake = self.heads(fake, left, pooled)
            loss = (critic_losses(of_real, of_fake) + penalty).mean()
        if not loss.isfinite():
            raise UserError("the loss of the motion critic is not finite; lower its lr, or leave the motion loss out")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.steps += 1
        return {"real": float(of_real.detach().mean()), "fake": float(of_fake.detach().mean())}

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on with the same losses, for `load_state_dict`."""
        return {
            "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict(), "steps": self.steps,
            "draws": self.draws.get_state(),
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draws.set_state(state["draws"])
        self.steps = state["steps"]
