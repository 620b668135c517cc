-- Environment x role x controller x epsilon: episodes planned when the version was sealed, done, failed, and left.
WITH plan AS (
    SELECT environment, role, root, controller, epsilon, sum(planned)::BIGINT AS planned
    FROM _planned
    GROUP BY ALL
),

found AS (
    SELECT
        environment,
        role,
        root,
        controller,
        epsilon,
        count(*) FILTER (outcome <> 'failed') AS done,
        count(*) FILTER (outcome = 'failed') AS failed
    FROM episodes
    GROUP BY ALL
)

SELECT
    environment,
    role,
    root,
    controller,
    epsilon,
    -- null where the plan does not have the cell: an earlier matrix brought it
    planned,
    coalesce(done, 0) AS done,
    coalesce(failed, 0) AS failed,
    CASE WHEN planned IS NOT NULL THEN greatest(planned - coalesce(done, 0) - coalesce(failed, 0), 0) END AS remaining
FROM plan
FULL JOIN found USING (environment, role, root, controller, epsilon)
