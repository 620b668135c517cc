-- Environment x role x controller x epsilon: how many episodes, how they ended, what they gained.
SELECT
    environment,
    role,
    root,
    controller,
    epsilon,
    count(*) AS episodes,
    count(DISTINCT env_seed) AS env_seeds,
    count(DISTINCT (env_seed, history_id)) AS distinct_histories,
    count(*) FILTER (outcome = 'completed') AS completed,
    count(*) FILTER (outcome = 'rolled_back') AS rolled_back,
    count(*) FILTER (outcome = 'diverged') AS diverged,
    count(*) FILTER (outcome = 'failed') AS failed,
    count(*) FILTER (NOT control_valid) AS control_invalid,
    avg(100 * (final_val_accuracy - control_final_val_accuracy)) AS mean_gain_points,
    avg(100 * (final_test_accuracy - control_final_test_accuracy)) AS mean_test_gain_points,
    avg(num_fossils) AS mean_fossils,
    avg(final_seed_params) AS mean_seed_params
FROM episodes
GROUP BY ALL
