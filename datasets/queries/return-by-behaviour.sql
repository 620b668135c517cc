-- Paired gain, growth and final accuracy of each controller and epsilon, best first.
SELECT
    environment,
    controller,
    epsilon,
    count(*) AS episodes,
    count(DISTINCT env_seed) AS env_seeds,
    avg(gain_points) AS mean_gain_points,
    stddev_samp(gain_points) AS sd_gain_points,
    avg(growth_log2) AS mean_growth_log2,
    avg(test_percent) AS mean_test_percent,
    avg(num_fossils) AS mean_fossils
FROM returns
WHERE outcome <> 'failed'
GROUP BY ALL
ORDER BY environment, mean_gain_points DESC, controller, epsilon
