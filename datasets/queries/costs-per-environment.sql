-- What each environment cost: episodes, hours alone and shared, seconds an episode, operations, the dearest behaviour.
WITH dearest AS (
    SELECT environment, arg_max(controller, mean_alone_s) AS dearest_controller, max(mean_alone_s) AS dearest_mean_alone_s
    FROM cell_costs
    GROUP BY environment
)

SELECT
    environment,
    count(*) AS episodes,
    sum(alone_s) / 3600 AS alone_hours,
    sum(shared_s) / 3600 AS shared_hours,
    avg(shared_s) AS mean_shared_s,
    sum(alone_s) / nullif(sum(shared_s), 0) AS times_cheaper,
    sum(train_flops) AS train_flops,
    any_value(dearest_controller) AS dearest_controller,
    any_value(dearest_mean_alone_s) AS dearest_mean_alone_s
FROM episode_costs
LEFT JOIN dearest USING (environment)
GROUP BY environment
ORDER BY shared_hours DESC NULLS LAST, environment
