-- How each behaviour fares under every reward there is, the version's own marked: does the order of behaviours hold?
WITH means AS (
    SELECT
        environment,
        reward,
        bool_or(own) AS own,
        controller,
        epsilon,
        count(return) AS episodes,
        avg(return) AS mean_return,
        stddev_samp(return) / sqrt(count(return)) AS standard_error
    FROM returns_by_reward
    WHERE mode = 'gain' AND outcome <> 'failed' AND control_valid
    GROUP BY environment, reward, controller, epsilon
)

SELECT
    *,
    rank() OVER (PARTITION BY environment, reward ORDER BY mean_return DESC) AS place
FROM means
ORDER BY environment, own DESC, reward, place, controller, epsilon
