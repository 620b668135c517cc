-- CPU seconds an episode would take alone, and what it took in its cohort.
WITH totals AS (
    SELECT
        environment,
        episode_id,
        sum(cpu_s_alone) AS alone_s,
        sum(cpu_s_shared) AS shared_s
    FROM costs
    GROUP BY ALL
)

SELECT
    environment,
    count(*) AS episodes,
    avg(alone_s) AS mean_alone_s,
    avg(shared_s) AS mean_shared_s,
    sum(alone_s) / nullif(sum(shared_s), 0) AS times_cheaper
FROM totals
GROUP BY environment
ORDER BY environment
