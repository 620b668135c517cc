-- What became of the seeds of each blueprint: committed, pruned, or still there when the budget ended.
WITH events AS (
    SELECT
        environment,
        blueprint,
        count(*) FILTER (op = 'GERMINATE') AS germinated,
        count(*) FILTER (op = 'ADVANCE') AS blended,
        count(*) FILTER (op = 'FOSSILIZE') AS fossilized,
        count(*) FILTER (op = 'PRUNE') AS pruned
    FROM decisions
    WHERE executed AND op <> 'WAIT'
    GROUP BY environment, blueprint
)

SELECT
    *,
    germinated - fossilized - pruned AS unfinished,
    fossilized / nullif(germinated, 0) AS fossilized_share
FROM events
ORDER BY environment, germinated DESC, blueprint
