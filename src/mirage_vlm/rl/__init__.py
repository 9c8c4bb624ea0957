"""Reinforcement learning on trajectories with latent spans: GRPO on TRL's trainer, with rollouts of our engine."""
