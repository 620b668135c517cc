-- One row per episode: the two parts of its return, and its paired gains in points. Return = (accuracy_points - rent * growth_log2) / scale.
WITH parts AS (
    SELECT
        episode_id,
        sum(reward_accuracy_points) AS accuracy_points,
        sum(reward_growth_log2) AS growth_log2
    FROM steps
    GROUP BY episode_id
)

SELECT
    episode_id, environment, env_seed, role, root, controller, epsilon, temperature, repetition, plan, outcome, num_steps,
    accuracy_points,
    growth_log2,
    100 * (final_val_accuracy - control_final_val_accuracy) AS gain_points,
    100 * (final_test_accuracy - control_final_test_accuracy) AS test_gain_points,
    100 * (uncommitted_val_accuracy - control_final_val_accuracy) AS uncommitted_gain_points,
    100 * final_val_accuracy AS val_percent,
    100 * final_test_accuracy AS test_percent,
    final_seed_params,
    1 + final_seed_params / host_params AS growth_factor,
    num_fossils,
    train_flops,
    control_valid,
    history_id
FROM episodes
LEFT JOIN parts USING (episode_id)
