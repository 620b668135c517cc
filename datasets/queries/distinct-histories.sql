-- How many different things the episodes of each environment did, and how often one history repeats on an env_seed.
WITH histories AS (
    SELECT environment, env_seed, history_id, count(*) AS multiplicity
    FROM episodes
    WHERE outcome <> 'failed'
    GROUP BY ALL
)

SELECT
    environment,
    sum(multiplicity)::BIGINT AS episodes,
    count(*) AS distinct_histories,
    max(multiplicity) AS max_multiplicity,
    1 - count(*) / sum(multiplicity) AS repeated_share
FROM histories
GROUP BY environment
ORDER BY environment
