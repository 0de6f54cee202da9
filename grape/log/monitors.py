"""The views that watch for rewards that are not earned: length, stock phrases, judges that differ, trivial controls.

``merit`` is the score after polarity. Where items, routes or runs are compared, ``weighted`` is: the sum of weight x
score after polarity, which does not move with the confidences of a batch. Held-out results are those of the run
`NAME.heldout`, null controls (`grape score --controls`) those of `NAME.controls`.
"""

from grape.phrases import STOCK_PHRASES

# Without what has a shorter one within: `what a great question`.
SHORTEST = [
    phrase for phrase in STOCK_PHRASES if not any(other != phrase and other in phrase for other in STOCK_PHRASES)
]

QUERIES = """
-- score_by_length: Does length pay? Per item, how its score goes with the length of the responses.
WITH scored AS (
  SELECT v.run, v.rubric, v.category, v.item, length(r.response) AS size,
    if(v.polarity = 'undesirable', 1 - v.score, v.score) AS merit,
    size - avg(size) OVER siblings AS longer, merit - avg(merit) OVER siblings AS better,
    ntile(5) OVER (PARTITION BY v.run, v.rubric, v.category, v.item ORDER BY size, v.step, v.response_id) AS fifth
  FROM verdicts v
  JOIN responses r
    ON v.run = r.run AND v.step IS NOT DISTINCT FROM r.step
    AND v.question_id = r.question_id AND v.response_id = r.response_id
  WHERE v.score IS NOT NULL
  WINDOW siblings AS (PARTITION BY v.run, v.step, v.question_id, v.item)
)
SELECT
  run AS run,                                                -- the run
  rubric AS rubric,                                          -- the rubric's name
  category AS category,                                      -- the questions' category
  item AS item,                                              -- the item's id
  count(*) AS n,                                             -- responses that were scored
  avg(size) AS mean_length,                                  -- mean length in characters
  if(stddev_pop(size) > 0 AND stddev_pop(merit) > 0,
    corr(merit, size), NULL) AS correlation,                 -- of merit with length; NULL where one of them is constant
  if(stddev_pop(longer) > 0 AND stddev_pop(better) > 0,
    corr(better, longer), NULL) AS correlation_within,       -- the same among responses to one question
  avg(merit) FILTER (fifth = 1) AS shortest,                 -- mean merit of the shortest fifth
  avg(merit) FILTER (fifth = 2) AS second,                   -- of the second fifth
  avg(merit) FILTER (fifth = 3) AS third,                    -- of the third
  avg(merit) FILTER (fifth = 4) AS fourth,                   -- of the fourth
  avg(merit) FILTER (fifth = 5) AS longest                   -- of the longest
FROM scored GROUP BY run, rubric, category, item
ORDER BY abs(correlation_within) DESC NULLS LAST, run, rubric, item;

-- judge_gap: Does training please its judge alone? Its scores beside a held-out judge's, or another's, by step.
WITH merits AS (
  SELECT run, step, category, item, criterion, response_id, coalesce(judge, kind) AS judge, judge_hash,
    if(polarity = 'undesirable', 1 - score, score) AS merit
  FROM verdicts WHERE score IS NOT NULL
), means AS (
  SELECT run, step, category, item, string_agg(DISTINCT judge, ', ' ORDER BY judge) AS judge, count(*) AS n,
    avg(merit) AS merit
  FROM merits GROUP BY run, step, category, item
), heldout AS (
  SELECT left(run, -8) AS trained, * FROM means WHERE run LIKE '%.heldout'
), first AS (
  SELECT run, min(step) AS step FROM verdicts GROUP BY run
), pairs AS (
  SELECT h.trained AS run, h.step AS step, h.category AS category, h.item AS item, 'heldout' AS how, m.judge AS judge,
    h.judge AS other, m.n AS n, h.n AS other_n, m.merit AS merit, h.merit AS other_merit
  FROM heldout h
  JOIN first f ON f.run = h.trained
  JOIN means m
    ON m.run = h.trained AND m.step = greatest(h.step, f.step) AND m.category = h.category AND m.item = h.item
  UNION ALL
  SELECT a.run, a.step, a.category, a.item, 'same response', a.judge, b.judge, count(*), count(*), avg(a.merit),
    avg(b.merit)
  FROM merits a
  JOIN merits b
    ON a.run = b.run AND a.step IS NOT DISTINCT FROM b.step AND a.response_id = b.response_id
    AND a.criterion = b.criterion AND (a.item < b.item AND a.judge <> b.judge)
  GROUP BY a.run, a.step, a.category, a.item, a.judge, b.judge
)
SELECT
  run AS run,                                                -- the run
  step AS step,                                              -- the training step
  category AS category,                                      -- the questions' category
  item AS item,                                              -- the item's id
  how AS how,                                                -- heldout (other questions), or same response
  judge AS judge,                                            -- who judges it in training
  other AS other,                                            -- who judges it beside that
  n AS n,                                                    -- scores in training
  other_n AS other_n,                                        -- scores of the other
  merit AS mean_merit,                                       -- mean merit in training
  other_merit AS other_merit,                                -- mean merit by the other
  merit - other_merit AS gap,                                -- above 0: training's judge is the kinder one
  gap - first_value(gap) OVER (
    PARTITION BY run, category, item, how, judge, other
    ORDER BY step) AS widened                                -- by how much since the first step of this comparison
FROM pairs ORDER BY run, category, item, how, judge, other, step;

-- constant_items: Items that tell nothing apart: one score throughout, or the same within every group.
WITH scored AS (
  SELECT *, count(score) OVER siblings AS together, max(score) OVER siblings - min(score) OVER siblings AS spread
  FROM verdicts WHERE score IS NOT NULL
  WINDOW siblings AS (PARTITION BY run, step, question_id, rubric_hash, item)
)
SELECT
  run AS run,                                                -- the run
  rubric AS rubric,                                          -- the rubric's name
  category AS category,                                      -- the questions' category
  item AS item,                                              -- the item's id
  any_value(kind) AS kind,                                   -- check, judge or reward_model
  count(*) AS n,                                             -- scores
  count(DISTINCT (step, question_id))
    FILTER (together > 1) AS groups,                         -- groups with at least two of them
  count(DISTINCT score) AS num_values,                       -- different scores: 1 where it never varies
  if(num_values = 1, any_value(score), NULL) AS score,       -- that one score
  avg(weight) AS weight                                      -- its mean share of the rubric, which it wastes
FROM scored GROUP BY run, rubric, category, item
HAVING n > 1 AND (num_values = 1 OR (groups > 0 AND max(spread) = 0))
ORDER BY weight DESC, run, rubric, item;

-- judge_disagreement: Judges on the same response and criterion, in any runs: how far they are apart.
WITH judged AS (
  SELECT DISTINCT q.question, r.response, v.criterion, v.judge, v.judge_hash,
    if(v.polarity = 'undesirable', 1 - v.score, v.score) AS merit
  FROM verdicts v
  JOIN responses r
    ON v.run = r.run AND v.step IS NOT DISTINCT FROM r.step
    AND v.question_id = r.question_id AND v.response_id = r.response_id
  LEFT JOIN questions q ON v.run = q.run AND v.question_id = q.question_id
  WHERE v.kind = 'judge' AND v.score IS NOT NULL
), means AS (
  SELECT question, response, criterion, judge, judge_hash, avg(merit) AS merit FROM judged GROUP BY ALL
)
SELECT
  a.criterion AS criterion,                                  -- what was judged
  a.judge AS judge,                                          -- one judge
  b.judge AS other,                                          -- the other; of the same name where its file has changed
  count(*) AS n,                                             -- responses that both have scored
  avg(a.merit) AS mean_merit,                                -- mean merit by the one
  avg(b.merit) AS other_merit,                               -- by the other
  avg(abs(a.merit - b.merit)) AS mean_difference,            -- mean absolute difference
  avg(((a.merit - 0.5) * (b.merit - 0.5) < 0)::INTEGER)
    AS share_contradicting                                   -- share on opposite sides of one half
FROM means a
JOIN means b
  ON a.question IS NOT DISTINCT FROM b.question AND a.response = b.response AND a.criterion = b.criterion
  AND (a.judge, coalesce(a.judge_hash, '')) < (b.judge, coalesce(b.judge_hash, ''))
GROUP BY a.criterion, a.judge, b.judge, a.judge_hash, b.judge_hash
ORDER BY mean_difference DESC, criterion, judge, other;

-- stock_phrases: Do stock phrases spread, and do they pay? Responses that hold one, by run, step and category.
WITH found AS (
  SELECT r.run, r.step, r.category, w.weighted,
    regexp_extract_all(
      regexp_replace(replace(replace(lower(r.response), '’', ''''), '‘', ''''), '\\s+', ' ', 'g'),
      '(?:^|[^\\pL\\pN_])(@PHRASES)(?:$|[^\\pL\\pN_])', 1) AS phrases
  FROM responses r
  LEFT JOIN rewards w
    ON r.run = w.run AND r.step IS NOT DISTINCT FROM w.step
    AND r.question_id = w.question_id AND r.response_id = w.response_id
)
SELECT
  run AS run,                                                -- the run
  step AS step,                                              -- the training step
  category AS category,                                      -- the questions' category
  count(*) AS n,                                             -- responses
  count(*) FILTER (len(phrases) > 0) AS num_stock,           -- those with a stock phrase
  num_stock / n AS share,                                    -- their share
  mode(phrases[1]) FILTER (len(phrases) > 0) AS example,     -- the phrase that most of them begin with
  avg(weighted) FILTER (len(phrases) > 0) AS weighted_with,  -- mean sum of weight x score with one
  avg(weighted) FILTER (len(phrases) = 0) AS weighted_without -- and without
FROM found GROUP BY run, step, category ORDER BY run, category, step;

-- null_controls: Trivial responses that were judged like the others: the share that beats the mean of the real ones.
WITH real AS (
  SELECT w.run, w.step, w.question_id, avg(w.weighted) AS weighted
  FROM rewards w
  WHERE w.weighted IS NOT NULL AND w.run NOT LIKE '%.controls'
  GROUP BY w.run, w.step, w.question_id
), controls AS (
  SELECT left(r.run, -9) AS run, r.step, r.question_id, r.category, r.response, w.weighted
  FROM responses r
  LEFT JOIN rewards w
    ON r.run = w.run AND r.step IS NOT DISTINCT FROM w.step
    AND r.question_id = w.question_id AND r.response_id = w.response_id
  WHERE r.route = 'control' AND r.run LIKE '%.controls'
)
SELECT
  c.run AS run,                                              -- the run whose questions they answer
  c.category AS category,                                    -- the questions' category
  c.response AS response,                                    -- the trivial text
  count(*) AS n,                                             -- controls with this text
  count(c.weighted) AS scored,                               -- those with a reward
  avg(c.weighted) AS weighted,                               -- their mean sum of weight x score
  avg(real.weighted) AS sibling_weighted,                    -- that of the real responses to their questions
  count(*) FILTER (c.weighted > real.weighted) AS rewarded,  -- controls above the mean of their siblings
  rewarded / nullif(count(*) FILTER (
    c.weighted IS NOT NULL AND real.weighted IS NOT NULL), 0)
    AS share                                                 -- their share: above 0, look at the judge
FROM controls c
LEFT JOIN real
  ON c.run = real.run AND c.step IS NOT DISTINCT FROM real.step AND c.question_id = real.question_id
GROUP BY c.run, c.category, c.response ORDER BY share DESC NULLS LAST, c.run, c.category, c.response;
""".replace("@PHRASES", "|".join(phrase.replace("'", "''") for phrase in SHORTEST))
