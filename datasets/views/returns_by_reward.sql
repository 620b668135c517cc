-- One row per episode, reward and mode: its return. `own` marks the reward that the version was made under.
WITH parts AS (
    SELECT
        episode_id,
        -- an episode that lacks a component has no return
        CASE WHEN count(*) = count(reward_accuracy_points) THEN fsum(reward_accuracy_points) END AS accuracy_points,
        CASE WHEN count(*) = count(reward_growth_log2) THEN fsum(reward_growth_log2) END AS growth_log2
    FROM steps
    WHERE NOT is_last
    GROUP BY episode_id
)

SELECT
    episode_id, environment, env_seed, role, root, controller, epsilon, outcome, control_valid,
    reward,
    mode,
    list_contains(environments, environment) AS own,
    (accuracy_points - rent_points * growth_log2) / scale_points AS return
FROM episodes
LEFT JOIN parts USING (episode_id)
CROSS JOIN rewards
-- both pay the same in all; `decision_rewards` has when
CROSS JOIN (VALUES ('gain'), ('sparse')) AS modes (mode)
