"""The views of a training run: its curve, which items moved the policy, and whether improving helps.

What is compared over time and between routes is ``weighted``, the sum of weight x score after polarity: rewards move
with the confidences of their batch. A pair is one group that holds improved and fresh responses: the means of the two
are compared, so that responses to one question never count as independent of each other.
"""

QUERIES = """
-- training_curve: One row per run, step and category: rewards, lengths, and groups that teach nothing.
WITH earned AS (
  SELECT r.run, r.step, r.category, r.question_id, r.route, r.num_tokens, r.finish_reason, w.reward, w.weighted,
    w.unscorable, w.advantage, max(abs(w.advantage)) OVER siblings AS largest
  FROM responses r
  LEFT JOIN rewards w
    ON r.run = w.run AND r.step IS NOT DISTINCT FROM w.step
    AND r.question_id = w.question_id AND r.response_id = w.response_id
  WINDOW siblings AS (PARTITION BY r.run, r.step, r.question_id)
)
SELECT
  run AS run,                                                -- the run
  step AS step,                                              -- the training step
  category AS category,                                      -- the questions' category
  count(*) AS responses,                                     -- responses, of every route
  count(DISTINCT question_id) AS groups,                     -- questions that were asked
  count(DISTINCT question_id)
    FILTER (largest = 0) AS dead_groups,                     -- groups whose advantages are all 0
  avg(reward) AS mean_reward,                                -- by the rubric's formula
  avg(weighted) AS mean_weighted,                            -- sum of weight x score after polarity
  avg(weighted) FILTER (route = 'fresh') AS fresh_weighted,  -- the same of fresh responses
  avg(weighted)
    FILTER (route = 'improve') AS improved_weighted,         -- the same of improved responses
  stddev_pop(advantage) AS advantage_spread,                 -- standard deviation of the advantages
  avg(num_tokens) AS mean_tokens,                            -- length of the responses
  avg((finish_reason = 'length')::INTEGER)
    AS share_truncated,                                      -- of the responses, cut at the limit
  avg((unscorable IS NOT NULL)::INTEGER) AS share_unscorable -- of the responses, without a reward
FROM earned GROUP BY run, step, category ORDER BY run, step, category;

-- moved_most: One row per item: its share of what moved the policy, the sum of |credit|, greatest first.
WITH parts AS (
  SELECT run, category, trained, unnest(map_entries(credit)) AS part FROM rewards
)
SELECT
  run AS run,                                                -- the run
  category AS category,                                      -- the questions' category
  part.key AS item,                                          -- the item; +length and the like are no item's
  count(*) AS n,                                             -- responses that it was judged on and that were trained on
  avg(abs(part.value)) AS mean_credit,                       -- mean of |credit|
  sum(abs(part.value)) AS credit,                            -- sum of |credit|
  sum(abs(part.value))
    / nullif(sum(sum(abs(part.value))) OVER (PARTITION BY run), 0)
    AS share                                                 -- of that sum over all items of the run
FROM parts WHERE trained IS DISTINCT FROM false
GROUP BY run, category, part.key ORDER BY share DESC NULLS LAST, run, category, item;

-- improve_effect: Does improved beat fresh? By the assessment that was shown: mean difference within groups.
WITH scored AS (
  SELECT r.run, r.step, r.question_id, r.response_id, r.route, r.parent_id, coalesce(r.control, 'own') AS control,
    w.weighted
  FROM responses r JOIN rewards w USING (run, step, question_id, response_id) WHERE w.weighted IS NOT NULL
), fresh AS (
  SELECT run, step, question_id, avg(weighted) AS weighted FROM scored WHERE route = 'fresh' GROUP BY ALL
), improved AS (
  SELECT i.*, (
      SELECT arg_max(p.weighted, p.step) FROM scored p
      WHERE p.run = i.run AND p.question_id = i.question_id AND p.response_id = i.parent_id AND p.step <= i.step
    ) AS parent
  FROM scored i WHERE route = 'improve'
), pairs AS (
  SELECT i.run, i.control, count(*) AS responses, avg(i.weighted) AS improved, any_value(f.weighted) AS fresh,
    avg(i.weighted) - any_value(f.weighted) AS gain, avg(i.weighted - i.parent) AS over_parent
  FROM improved i LEFT JOIN fresh f USING (run, step, question_id)
  GROUP BY i.run, i.control, i.step, i.question_id
), effects AS (
  SELECT run, control, sum(responses)::BIGINT AS responses, count(gain) AS n,
    avg(improved) FILTER (gain IS NOT NULL) AS mean_improved, avg(fresh) AS mean_fresh,
    avg(gain) AS gain, stddev_samp(gain) / sqrt(count(gain)) AS se,
    count(over_parent) AS parents, avg(over_parent) AS over_parent,
    stddev_samp(over_parent) / sqrt(count(over_parent)) AS parent_se
  FROM pairs GROUP BY run, control
)
SELECT
  e.run AS run,                                              -- the run
  e.control AS control,                                      -- the assessment that was shown: own, shuffled or none
  e.responses AS responses,                                  -- improved responses with a reward
  e.n AS n,                                                  -- pairs: groups that have fresh ones too
  e.mean_improved AS mean_improved,                          -- their improved responses' weighted, mean of group means
  e.mean_fresh AS mean_fresh,                                -- the same of their fresh responses
  e.gain AS gain,                                            -- mean difference: above 0, improved beats fresh
  e.se AS se,                                                -- its standard error
  e.gain - 1.96 * e.se AS low,                               -- 95 % interval of the gain, from
  e.gain + 1.96 * e.se AS high,                              -- to
  o.gain - e.gain AS own_more,                               -- what the own assessment gains more than this one
  own_more - 1.96 * sqrt(o.se ** 2 + e.se ** 2) AS own_low,  -- 95 % interval of that, as of independent groups, from
  own_more + 1.96 * sqrt(o.se ** 2 + e.se ** 2) AS own_high, -- to
  e.parents AS parents,                                      -- groups whose improved ones' parents have a reward
  e.over_parent AS over_parent,                              -- mean difference of improved responses to their parents
  e.parent_se AS parent_se,                                  -- its standard error
  e.over_parent - 1.96 * e.parent_se AS parent_low,          -- 95 % interval of that difference, from
  e.over_parent + 1.96 * e.parent_se AS parent_high          -- to
FROM effects e
LEFT JOIN effects o ON e.run = o.run AND o.control = 'own' AND e.control <> 'own'
ORDER BY run, list_position(['own', 'shuffled', 'none'], e.control);
"""
