"""The views of the critique log: what one asks of it most often, every column with its comment.

A failed verdict is one that applied and was due, but has no score (any outcome but ok and skipped). A group is the
responses to one question in one step of one run. ``merit`` is the score after polarity: high is good.
"""

from __future__ import annotations

import re

from grape.log.curves import QUERIES as CURVES
from grape.log.monitors import QUERIES as MONITORS
from grape.log.tables import quote

# `-- name: comment`, then the query; the comment of each of its columns stands behind it.
QUERIES = """
-- item_health: One row per rubric item, lowest confidence first: the candidates for manual review.
WITH judged AS (
  SELECT *, outcome = 'ok' AS valid, count(score) OVER siblings AS scored,
    max(score) OVER siblings - min(score) OVER siblings AS spread
  FROM verdicts WHERE applicable AND outcome <> 'skipped'
  WINDOW siblings AS (PARTITION BY run, step, question_id, rubric_hash, item)
)
SELECT
  run AS run,                                                -- the run
  rubric AS rubric,                                          -- the rubric's name
  rubric_hash AS rubric_hash,                                -- content hash of the rubric's file
  category AS category,                                      -- the questions' category
  item AS item,                                              -- the item's id
  any_value(kind) AS kind,                                   -- check, judge or reward_model
  any_value(polarity) AS polarity,                           -- desirable, or undesirable (bad when met)
  count(*) AS n,                                             -- verdicts that were due
  avg(score) AS mean_score,                                  -- mean score, as judged
  avg(if(polarity = 'undesirable',
    1 - score, score)) AS mean_merit,                        -- mean score after polarity
  stddev_samp(score) AS std_score,                           -- its standard deviation over all responses
  avg(confidence) AS mean_confidence,                        -- mean confidence; reliable judgements are confident ones
  stddev_samp(confidence) AS std_confidence,                 -- its standard deviation
  avg((NOT valid)::INTEGER) AS share_failed,                 -- share of the verdicts that have no score
  count(DISTINCT (run, step, question_id))
    FILTER (scored > 1) AS groups,                           -- groups with at least two scores
  count(DISTINCT (run, step, question_id)) FILTER (scored > 1 AND spread > 0)
    / nullif(groups, 0) AS share_separated                   -- of those, the share whose scores differ
FROM judged GROUP BY run, rubric, rubric_hash, category, item
ORDER BY mean_confidence NULLS FIRST, run, rubric, item;

-- response_scores: One row per response: its text, what it earned, and how well it was measured.
WITH counted AS (
  SELECT run, step, question_id, response_id, count(*) FILTER (applicable) AS items,
    sum(weight * if(polarity = 'undesirable', 1 - score, score))
      / nullif(sum(weight) FILTER (outcome = 'ok'), 0) AS measured,
    count(*) FILTER (applicable AND outcome NOT IN ('ok', 'skipped')) AS failed,
    list(DISTINCT judge ORDER BY judge) FILTER (applicable AND judge IS NOT NULL) AS judges,
    list(DISTINCT judge ORDER BY judge) FILTER (applicable AND outcome NOT IN ('ok', 'skipped')) AS failed_judges
  FROM verdicts GROUP BY run, step, question_id, response_id
)
SELECT
  r.run AS run,                                              -- the run
  r.step AS step,                                            -- the training step
  r.question_id AS question_id,                              -- the group
  r.response_id AS response_id,                              -- the response
  r.category AS category,                                    -- the question's category
  r.route AS route,                                          -- where it came from: given, fresh, improve or sft
  r.parent_id AS parent_id,                                  -- the response that it improves
  r.control AS control,                                      -- whose assessment it was shown: own, shuffled or none
  r.finish_reason AS finish_reason,                          -- why generation ended: stop, length, ...
  r.num_tokens AS num_tokens,                                -- length in tokens of the policy
  r.metadata AS metadata,                                    -- further fields of its row, such as its model
  w.reward AS reward,                                        -- by the rubric's formula; NULL if unscorable
  w.penalty AS penalty,                                      -- what was added to the reward before the baseline
  w.advantage AS advantage,                                  -- what the optimizer uses
  w.trained AS trained,                                      -- whether the optimizer took it
  coalesce(w.weighted, c.measured) AS weighted,              -- sum of weight x score after polarity
  coalesce(c.items, 0) AS num_items,                         -- items that apply
  coalesce(c.failed, 0) AS num_failed,                       -- verdicts without a score where one was due
  c.judges AS judges,                                        -- who judged
  c.failed_judges AS failed_judges,                          -- whose verdicts failed
  w.gate AS gate,                                            -- the item whose gate set the reward
  w.unscorable AS unscorable,                                -- why there is no reward
  r.response AS response                                     -- the text
FROM responses r
LEFT JOIN rewards w
  ON r.run = w.run AND r.step IS NOT DISTINCT FROM w.step
  AND r.question_id = w.question_id AND r.response_id = w.response_id
LEFT JOIN counted c
  ON r.run = c.run AND r.step IS NOT DISTINCT FROM c.step
  AND r.question_id = c.question_id AND r.response_id = c.response_id;

-- failures: How verdicts fail, by run, judge, item and outcome, most frequent first.
WITH due AS (
  SELECT *, count(*) OVER siblings AS group_size,
    count(*) FILTER (outcome <> 'ok') OVER siblings AS group_failed,
    count(*) OVER (PARTITION BY run, kind, judge, rubric, item) AS asked
  FROM verdicts WHERE applicable AND outcome <> 'skipped'
  WINDOW siblings AS (PARTITION BY run, step, question_id, rubric_hash, item)
)
SELECT
  run AS run,                                                -- the run
  kind AS kind,                                              -- check, judge or reward_model
  judge AS judge,                                            -- whose verdict it was
  rubric AS rubric,                                          -- the rubric's name
  item AS item,                                              -- the item's id
  outcome AS outcome,                                        -- how it failed
  count(*) AS n,                                             -- verdicts that failed so
  count(*) / any_value(asked) AS share,                      -- of all verdicts that this judge owed on this item
  avg((group_failed < group_size)::INTEGER)
    FILTER (group_size > 1) AS share_alone,                  -- with a sibling that was judged: 1 points to the response
  any_value(detail) AS example                               -- what one of them said
FROM due WHERE outcome <> 'ok'
GROUP BY run, kind, judge, rubric, item, outcome ORDER BY n DESC, run, judge, item, outcome;

-- failure_siblings: Responses whose verdicts failed, beside their siblings: is one breaking the judge? Worst first.
WITH due AS (
  SELECT run, step, question_id, response_id, category, count(*) AS owed,
    count(*) FILTER (outcome <> 'ok') AS failed,
    list(DISTINCT outcome ORDER BY outcome) FILTER (outcome <> 'ok') AS outcomes,
    list(DISTINCT judge ORDER BY judge) FILTER (outcome <> 'ok') AS judges,
    list(DISTINCT item ORDER BY item) FILTER (outcome <> 'ok') AS items
  FROM verdicts WHERE applicable AND outcome <> 'skipped' GROUP BY ALL
), beside AS (
  SELECT *, count(*) OVER everyone - 1 AS num_siblings, sum(owed) OVER everyone - owed AS sibling_owed,
    sum(failed) OVER everyone - failed AS sibling_failed
  FROM due WINDOW everyone AS (PARTITION BY run, step, question_id)
)
SELECT
  b.run AS run,                                              -- the run
  b.step AS step,                                            -- the training step
  b.question_id AS question_id,                              -- the group
  b.response_id AS response_id,                              -- the response
  b.category AS category,                                    -- the question's category
  b.failed AS num_failed,                                    -- its verdicts without a score
  b.failed / b.owed AS share_failed,                         -- of its verdicts that were due
  b.num_siblings AS num_siblings,                            -- other responses to the same question
  b.sibling_failed
    / nullif(b.sibling_owed, 0) AS sibling_share,            -- the same share over its siblings
  share_failed - sibling_share AS excess,                    -- 0 where all fail alike, 1 where it alone fails
  b.outcomes AS outcomes,                                    -- how its verdicts failed
  b.items AS items,                                          -- on which items
  b.judges AS judges,                                        -- whose verdicts they were
  w.reward AS reward,                                        -- what it earned all the same
  w.advantage AS advantage                                   -- above 0: failing paid
FROM beside b
LEFT JOIN rewards w
  ON b.run = w.run AND b.step IS NOT DISTINCT FROM w.step
  AND b.question_id = w.question_id AND b.response_id = w.response_id
WHERE b.failed > 0 ORDER BY excess DESC NULLS LAST, num_failed DESC, response_id;

-- judge_cost: What judging cost, by run, judge and model.
SELECT
  run AS run,                                                -- the run
  judge AS judge,                                            -- the judge's name
  model AS model,                                            -- the model that was asked
  count(*) AS calls,                                         -- calls, each counted once however often it was retried
  count(*) FILTER (outcome <> 'ok') AS failed,               -- calls without a usable reply
  sum(attempts)::BIGINT AS attempts,                         -- requests sent, retries included
  sum(input_tokens)::BIGINT AS input_tokens,                 -- tokens sent
  sum(output_tokens)::BIGINT AS output_tokens,               -- tokens received
  sum(cost) AS cost,                                         -- by the judge's price list
  avg(latency) AS mean_latency                               -- seconds
FROM judge_calls GROUP BY run, judge, model ORDER BY cost DESC NULLS LAST, calls DESC;

-- item_credit: One row per response and item: its part of the advantage. The credits of a response sum to it.
WITH parts AS (
  SELECT run, step, question_id, response_id, category, reward, advantage, unnest(map_entries(credit)) AS part
  FROM rewards
)
SELECT
  p.run AS run,                                              -- the run
  p.step AS step,                                            -- the training step
  p.question_id AS question_id,                              -- the group
  p.response_id AS response_id,                              -- the response
  p.category AS category,                                    -- the question's category
  p.part.key AS item,                                        -- the item
  p.part.value AS credit,                                    -- its part of the advantage
  v.weight AS weight,                                        -- its share of the rubric
  v.polarity AS polarity,                                    -- desirable, or undesirable (bad when met)
  v.outcome AS outcome,                                      -- ok, or why there is no score
  v.score AS score,                                          -- as judged
  if(v.polarity = 'undesirable',
    1 - v.score, v.score) AS merit,                          -- the score after polarity
  v.imputed_score AS imputed_score,                          -- what stood in for a missing score
  v.confidence AS confidence,                                -- the verdict's own
  v.mean_confidence AS mean_confidence,                      -- the batch mean that the reward used
  p.reward AS reward,                                        -- the response's reward
  p.advantage AS advantage                                   -- the response's advantage
FROM parts p
LEFT JOIN verdicts v
  ON p.run = v.run AND p.step IS NOT DISTINCT FROM v.step
  AND p.question_id = v.question_id AND p.response_id = v.response_id
  AND p.part.key = v.item;

-- dictionary: Every column of every table and view, with its comment.
SELECT
  table_name AS name,                                        -- the table or view
  column_name AS "column",                                   -- the column
  data_type AS type,                                         -- its DuckDB type
  coalesce(c.comment, v.comment) AS comment                  -- what it holds
FROM duckdb_columns() c LEFT JOIN (VALUES @COLUMNS@) v(view, "column", comment)
  ON c.table_name = v.view AND c.column_name = v."column"
WHERE NOT internal AND table_name NOT IN ('meta', 'spools') ORDER BY name, column_index;
"""


def create(text: str) -> str:
    """The SQL that makes, or makes anew, the views of such a text, with their comments.

    Those of columns stand in the view `dictionary`: DuckDB takes long to attach them to views, one by one.
    """
    script, columns = [], list[str]()
    for block in filter(None, map(str.strip, text.split(";\n"))):
        head, query = block.split("\n", 1)
        name, comment = head.removeprefix("-- ").split(": ", 1)
        script.append(f"CREATE OR REPLACE VIEW {name} AS {query}")
        script.append(f"COMMENT ON VIEW {name} IS {quote(comment)}")
        for column, what in re.findall(r' AS ("?\w+"?),? +-- (.*)', query):
            columns.append(f"({quote(name)}, {quote(column.strip(chr(34)))}, {quote(what)})")
    return ";\n".join([*script, ""]).replace("@COLUMNS@", ", ".join(columns))


VIEWS = create(QUERIES + CURVES + MONITORS)
