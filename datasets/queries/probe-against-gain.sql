-- Does the shadow probe before blending tell the final gain? Correlations over episodes that advanced exactly one seed.
WITH advanced AS (
    SELECT
        episode_id,
        count(*) OVER (PARTITION BY episode_id) AS seeds,
        [s0_val_loss_drop, s1_val_loss_drop, s2_val_loss_drop, s3_val_loss_drop, s4_val_loss_drop, s5_val_loss_drop]
            [action_slot + 1] AS val_loss_drop,
        [s0_seed_improvement, s1_seed_improvement, s2_seed_improvement, s3_seed_improvement, s4_seed_improvement,
            s5_seed_improvement][action_slot + 1] AS seed_improvement
    FROM steps
    WHERE op = 'ADVANCE' AND executed
)

SELECT
    environment,
    count(*) AS episodes,
    corr(val_loss_drop, uncommitted_gain_points) AS corr_loss_drop,
    corr(seed_improvement, uncommitted_gain_points) AS corr_improvement,
    avg(val_loss_drop) AS mean_loss_drop_nats,
    avg(seed_improvement) AS mean_improvement_points,
    avg(uncommitted_gain_points) AS mean_gain_points
FROM advanced
INNER JOIN returns USING (episode_id)
WHERE seeds = 1 AND outcome = 'completed'
GROUP BY environment
ORDER BY environment
