-- Share of each operation among unforced decisions, by the stage of the live seed furthest in its life.
SELECT
    environment,
    live_stage,
    op,
    count(*) AS decisions,
    count(*) / sum(count(*)) OVER (PARTITION BY environment, live_stage) AS share
FROM decisions
WHERE NOT forced AND NOT replayed
GROUP BY environment, live_stage, op
ORDER BY environment, live_stage, decisions DESC, op
