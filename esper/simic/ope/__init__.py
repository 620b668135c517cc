"""Off-policy evaluation: what a policy would be worth, from episodes of others."""
