-- Episodes that failed, diverged or were rolled back, by cell and first line of their error.
SELECT
    environment,
    role,
    controller,
    epsilon,
    outcome,
    control_valid,
    string_split(error, chr(10))[1] AS error,
    count(*) AS episodes,
    min(env_seed) AS first_env_seed
FROM episodes
WHERE outcome <> 'completed' OR NOT control_valid
GROUP BY ALL
ORDER BY episodes DESC, environment, controller, epsilon
