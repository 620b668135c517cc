-- Paired gain of episodes that committed exactly one seed, by its blueprint and slot.
WITH commits AS (
    SELECT
        episode_id,
        any_value(blueprint) AS blueprint,
        any_value(slot) AS slot
    FROM decisions
    WHERE op = 'FOSSILIZE' AND executed
    GROUP BY episode_id
    HAVING count(*) = 1
)

SELECT
    environment,
    blueprint,
    slot,
    count(*) AS episodes,
    count(DISTINCT env_seed) AS env_seeds,
    avg(gain_points) AS mean_gain_points,
    avg(growth_log2) AS mean_growth_log2
FROM commits
INNER JOIN returns USING (episode_id)
WHERE outcome = 'completed'
GROUP BY ALL
ORDER BY environment, mean_gain_points DESC, blueprint, slot
