-- Environment x role x controller x epsilon: seconds in all, alone and shared, and per episode.
WITH totals AS (
    SELECT episode_id, sum(cpu_s_alone) AS alone_s, sum(cpu_s_shared) AS shared_s
    FROM costs
    GROUP BY episode_id
)

SELECT
    environment,
    role,
    root,
    controller,
    epsilon,
    count(*) AS episodes,
    sum(alone_s) AS alone_s,
    sum(shared_s) AS shared_s,
    avg(alone_s) AS mean_alone_s,
    avg(shared_s) AS mean_shared_s,
    sum(alone_s) / nullif(sum(shared_s), 0) AS times_cheaper,
    sum(train_flops) AS train_flops
FROM episodes
LEFT JOIN totals USING (episode_id)
GROUP BY ALL
