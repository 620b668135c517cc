-- How often a gate refused what was valid, by operation and gate.
SELECT
    environment,
    op,
    coalesce(refused_by, '(carried out)') AS gate,
    count(*) AS decisions,
    count(*) / sum(count(*)) OVER (PARTITION BY environment, op) AS share
FROM decisions
WHERE op <> 'WAIT' AND NOT replayed
GROUP BY environment, op, refused_by
ORDER BY environment, op, decisions DESC, gate
