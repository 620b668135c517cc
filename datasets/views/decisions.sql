-- One row per decision: the state, the action in words, the reward's components, the next state.
WITH transformers AS (
    SELECT environment FROM episodes WHERE contains(environment_spec, '"kind":"transformer"')
),

ordered AS (
    SELECT
        *,
        lead(host_key) OVER episode AS next_host_key,
        lead(state_id) OVER episode AS next_state_id,
        lead(val_accuracy) OVER episode AS next_val_accuracy,
        lead(seed_params) OVER episode AS next_seed_params,
        [s0_stage, s1_stage, s2_stage, s3_stage, s4_stage, s5_stage] AS stages,
        [s0_blueprint, s1_blueprint, s2_blueprint, s3_blueprint, s4_blueprint, s5_blueprint] AS blueprints,
        CASE
            WHEN environment IN (SELECT environment FROM transformers)
                THEN ['norm', 'lora', 'lora_large', 'attention', 'mlp_small', 'mlp', 'gated_mlp', 'conv']
            ELSE ['norm', 'attention', 'conv_small', 'bottleneck', 'depthwise', 'dilated', 'conv_light', 'conv_heavy']
        END AS blueprint_names,
        ['DORMANT', 'GERMINATED', 'TRAINING', 'BLENDING', NULL, 'HOLDING', 'FOSSILIZED', 'PRUNED', 'EMBARGOED', 'RESETTING']
            AS stage_names
    FROM steps
    WINDOW episode AS (PARTITION BY episode_id ORDER BY step)
)

SELECT
    episode_id, environment, env_seed, step, actor, role, replayed,
    host_key, state_id,
    -- the stage of the live seed furthest in its life
    coalesce(
        stage_names[list_max(list_filter(stages, lambda stage: stage IN (2, 3, 4, 6)))], 'NO LIVE SEED'
    ) AS live_stage,
    horizon, val_loss, val_accuracy, control_val_accuracy, plateau_epochs, seed_params, host_params,
    valid_ops, forced,
    op,
    CASE WHEN op <> 'WAIT' THEN action_slot END AS slot,
    CASE WHEN op <> 'WAIT' THEN stage_names[stages[action_slot + 1]] END AS slot_stage,
    CASE
        WHEN op = 'GERMINATE' THEN blueprint_names[action_blueprint + 1]
        WHEN op <> 'WAIT' THEN blueprint_names[blueprints[action_slot + 1] + 1]
    END AS blueprint,
    CASE
        WHEN op = 'GERMINATE'
            THEN ['linear', 'sigmoid-0.5', 'sigmoid-1', 'sigmoid-2', 'gated'][action_blend + 1]
    END AS blend,
    CASE WHEN op = 'GERMINATE' THEN [3, 5, 8, 12][action_tempo + 1] END AS tempo_epochs,
    CASE WHEN op = 'GERMINATE' THEN [1, 2, 3, 5][action_dwell + 1] END AS dwell_epochs,
    CASE WHEN op = 'GERMINATE' THEN ['isolated', 'coadapt'][action_isolation + 1] END AS isolation,
    CASE WHEN op = 'GERMINATE' THEN [0.5, 1.0, 2.0][action_seed_lr + 1]::DOUBLE END AS seed_lr_factor,
    executed, refused_by,
    epsilon, temperature, plan, behaviour_logp, op_probs,
    reward_accuracy_points, reward_growth_log2,
    next_host_key, next_state_id, next_val_accuracy, next_seed_params,
    terminated, truncated
FROM ordered
WHERE NOT is_last
