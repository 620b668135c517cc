-- One row per episode: seconds it would have taken alone, seconds it took in its cohort, its operations.
WITH totals AS (
    SELECT
        episode_id,
        any_value(device) AS device,
        sum(cpu_s_alone) AS alone_s,
        sum(cpu_s_shared) AS shared_s,
        avg(riders) AS mean_riders
    FROM costs
    GROUP BY episode_id
)

SELECT
    episode_id, environment, env_seed, role, root, controller, epsilon, outcome, num_steps,
    device, alone_s, shared_s, mean_riders, train_flops
FROM episodes
LEFT JOIN totals USING (episode_id)
