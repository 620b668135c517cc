-- Cells that are not whole yet, or where episodes failed, then the rest: planned, done, failed and left.
SELECT
    environment,
    role,
    controller,
    epsilon,
    sum(planned)::BIGINT AS planned,
    sum(done)::BIGINT AS done,
    sum(failed)::BIGINT AS failed,
    sum(remaining)::BIGINT AS remaining,
    sum(done) / nullif(sum(planned), 0) AS done_share
FROM progress
GROUP BY ALL
ORDER BY remaining DESC NULLS LAST, failed DESC, environment, role, controller, epsilon
