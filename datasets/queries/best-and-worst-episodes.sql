-- The ten episodes with the greatest and the ten with the smallest paired gain of each environment.
WITH ranked AS (
    SELECT
        *,
        row_number() OVER (PARTITION BY environment ORDER BY gain_points DESC, episode_id) AS from_best,
        row_number() OVER (PARTITION BY environment ORDER BY gain_points, episode_id) AS from_worst
    FROM returns
    WHERE outcome <> 'failed'
)

SELECT
    environment,
    CASE WHEN from_best <= 10 THEN 'best' ELSE 'worst' END AS which,
    episode_id,
    env_seed,
    controller,
    epsilon,
    plan,
    gain_points,
    val_percent,
    num_fossils,
    final_seed_params
FROM ranked
WHERE from_best <= 10 OR from_worst <= 10
ORDER BY environment, gain_points DESC, episode_id
