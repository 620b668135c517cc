-- Entropy (nats) of the operations taken at each step, among unforced decisions.
WITH counted AS (
    SELECT environment, step, op, count(*) AS taken
    FROM decisions
    WHERE NOT forced AND NOT replayed
    GROUP BY environment, step, op
),

shares AS (
    SELECT *, taken / sum(taken) OVER (PARTITION BY environment, step) AS share
    FROM counted
)

SELECT
    environment,
    step,
    sum(taken)::BIGINT AS decisions,
    count(*) AS distinct_ops,
    greatest(-sum(share * ln(share)), 0) + 0 AS entropy_nats
FROM shares
GROUP BY environment, step
ORDER BY environment, step
