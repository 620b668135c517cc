"""Importing this registers `esper/Growth-v0` with Gymnasium, without importing the engine.

`gymnasium.make("esper.tolaria.gym_registration:esper/Growth-v0")` does both at once.
"""

from __future__ import annotations

from gymnasium.envs.registration import register

register(
    id="esper/Growth-v0",
    entry_point="esper.tolaria.gym_env:GrowthEnv",
    vector_entry_point="esper.tolaria.gym_env:GrowthVectorEnv",
)
