-- One row per decision, reward and mode: what followed the decision. `sparse` pays the whole return at the last one.
WITH whole AS (
    SELECT
        episode_id, environment, env_seed, step, op, replayed, reward_accuracy_points, reward_growth_log2,
        step = max(step) OVER episode AS at_end,
        fsum(reward_accuracy_points) OVER episode AS accuracy_points,
        fsum(reward_growth_log2) OVER episode AS growth_log2
    FROM steps
    WHERE NOT is_last
    WINDOW episode AS (PARTITION BY episode_id)
)

SELECT
    episode_id, environment, env_seed, step, op, replayed,
    reward,
    mode,
    list_contains(environments, environment) AS own,
    CASE
        WHEN mode = 'gain' THEN reward_accuracy_points - rent_points * reward_growth_log2
        WHEN at_end THEN accuracy_points - rent_points * growth_log2
        ELSE 0
    END / scale_points AS value
FROM whole
CROSS JOIN rewards
CROSS JOIN (VALUES ('gain'), ('sparse')) AS modes (mode)
