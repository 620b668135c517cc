-- One row per distinct host trajectory: which steps it covers and how many episodes ride it.
SELECT
    environment,
    env_seed,
    host_key,
    count(DISTINCT episode_id) AS riders,
    min(step) AS first_step,
    max(step) AS last_step,
    max(step) - min(step) + 1 AS num_steps,
    count(*) AS num_rows,
    max(val_accuracy) AS best_val_accuracy
FROM steps
GROUP BY environment, env_seed, host_key
