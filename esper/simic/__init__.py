"""Learning and evaluation: BC, IQL, CQL, PPO and paired statistics."""
