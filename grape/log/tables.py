"""The tables of the critique log: numbered migrations, every column with its comment."""

from __future__ import annotations

import re

# One line per table or column: `name: comment` at the margin, then `name  TYPE  comment`.
# A released migration is never edited: a change is a further entry of MIGRATIONS.
FIRST = """
runs: One run: what was asked for, and everything that decides its result.
  run              VARCHAR                the run's name, unique in the log
  kind             VARCHAR                what kind of run: score, train, ...
  started          TIMESTAMP              when it began (UTC)
  version          VARCHAR                the version of grape that ran it
  inputs           VARCHAR                hash of everything that decides the result
  config           JSON                   the options and the configuration it ran with
  rubrics          JSON                   category -> {rubric, version, hash}
  judges           JSON                   judge -> {model, hash}
  seed             BIGINT                 the seed of everything random

questions: What was asked. The responses to one question form a group.
  run              VARCHAR                the run, as in runs
  question_id      VARCHAR                names the question, and so the group
  category         VARCHAR                chooses the rubric
  question         VARCHAR                the prompt: its text, or the chat messages as JSON
  reference        VARCHAR                the ground truth, if there is one
  tests            VARCHAR                source of the tests that a program must pass
  entry_point      VARCHAR                the function that the tests call
  metadata         JSON                   further fields of the question's row
  items            JSON                   per-question rubric items, added to the category's rubric

responses: What was answered, and where the answer came from.
  run              VARCHAR                the run, as in runs
  step             INTEGER                the training step; 0 outside training
  response_id      VARCHAR                names the response, unique within run and step
  question_id      VARCHAR                the question, as in questions
  category         VARCHAR                the question's category
  response         VARCHAR                the text
  route            VARCHAR                where it came from: given, fresh, improve or sft
  parent_id        VARCHAR                the response that it improves
  prompt_hash      VARCHAR                hash of the system prompt it was sampled with
  finish_reason    VARCHAR                why generation ended: stop, length, ...
  num_tokens       INTEGER                length in tokens of the policy
  metadata         JSON                   further fields of the response's row, such as the model that wrote it
  created          TIMESTAMP              when it was read or sampled (UTC)

verdicts: One judgement of one response on one item: reasoning, score, confidence; or a typed failure.
  run              VARCHAR                the run, as in runs
  step             INTEGER                the training step; 0 outside training
  question_id      VARCHAR                the question, as in questions
  response_id      VARCHAR                the response, as in responses
  category         VARCHAR                the question's category
  rubric           VARCHAR                the rubric's name
  rubric_version   VARCHAR                the rubric's own version
  rubric_hash      VARCHAR                content hash of the rubric's file
  item             VARCHAR                the item's id in the rubric
  kind             VARCHAR                who judges: check, judge or reward_model
  criterion        VARCHAR                what the item asks for
  weight           DOUBLE                 share of a total of 1 after applicability; 0 where the item does not apply
  polarity         VARCHAR                desirable, or undesirable (bad when met; counts 1 - score)
  gate             DOUBLE                 the floor of a gate (after polarity); NULL for an item that is none
  gate_reward      DOUBLE                 the reward that a failed gate sets
  on_failure       VARCHAR                what stands in for a missing score: impute, drop or worst
  applicable       BOOLEAN                whether the item applies to the question
  outcome          VARCHAR                ok; or why there is no score: abstained, timeout, checker, skipped, ...
  score            DOUBLE                 as judged, in [0,1], before polarity; NULL unless the outcome is ok
  raw              VARCHAR                the judge's own label or number, on the item's scale
  confidence       DOUBLE                 in [0,1]; NULL unless the outcome is ok
  mean_confidence  DOUBLE                 the batch mean per category and item that the reward used
  imputed          BOOLEAN                whether the reward used a stand-in for a missing score
  imputed_score    DOUBLE                 that stand-in
  reasoning        VARCHAR                why this score
  critique         VARCHAR                the critique written before the score, in the two-call flow
  judge            VARCHAR                the judge's or checker's name
  judge_hash       VARCHAR                hash of the judge: model, prompt, sampling
  calls            VARCHAR                keys of the judge calls behind it, a JSON list; see judge_calls
  attempts         INTEGER                requests sent for it, retries included
  latency          DOUBLE                 seconds
  input_tokens     BIGINT                 tokens read by the judge
  output_tokens    BIGINT                 tokens written by the judge
  detail           VARCHAR                what went wrong, in one line
  created          TIMESTAMP              when it was given (UTC)

judge_calls: One answered or failed request to a judge, stored before its reply is used.
  run              VARCHAR                the run that asked, as in runs
  call             VARCHAR                content key: judge, messages and sampling; see verdicts.calls
  judge            VARCHAR                the judge's name
  model            VARCHAR                the model that was asked
  endpoint         VARCHAR                the server that was asked
  purpose          VARCHAR                score, critique, repair or revision
  messages         JSON                   what was sent
  sampling         JSON                   temperature, max_tokens, ...
  reply            VARCHAR                what came back, unchanged
  finish_reason    VARCHAR                why the reply ended: stop, length, ...
  outcome          VARCHAR                ok, or how it failed
  detail           VARCHAR                what went wrong, in one line
  attempts         INTEGER                requests sent, retries included
  latency          DOUBLE                 seconds
  input_tokens     BIGINT                 tokens of the messages
  output_tokens    BIGINT                 tokens of the reply
  cost             DOUBLE                 in the currency of the judge's price list
  created          TIMESTAMP              when it ended (UTC)

rewards: The reward and the advantage of one response, as used: stored, not to be derived again.
  run              VARCHAR                the run, as in runs
  step             INTEGER                the training step; 0 outside training
  question_id      VARCHAR                the group
  response_id      VARCHAR                the response, as in responses
  category         VARCHAR                the question's category
  formula          VARCHAR                grape (eq. 15), normalized, weighted or points
  baseline         VARCHAR                what was subtracted: group_mean, leave_one_out or none
  scale            VARCHAR                what it was divided by: none, group_std or batch_std
  reward           DOUBLE                 by the formula; NULL if the response is unscorable
  normalized       DOUBLE                 confidence-weighted mean of the scores after polarity, in [0,1]
  weighted         DOUBLE                 sum of weight x score after polarity, in [0,1]: for comparisons over time
  advantage        DOUBLE                 what the optimizer uses; 0 if the response is unscorable
  credit           MAP(VARCHAR, DOUBLE)   item -> its part of the advantage; the parts sum to it
  gate             VARCHAR                the item whose gate set the reward
  unscorable       VARCHAR                why there is no reward; NULL where there is one
  created          TIMESTAMP              when it was computed (UTC)

steps: One training step, or the one batch of a scoring run.
  run              VARCHAR                the run, as in runs
  step             INTEGER                the training step; 0 outside training
  started          TIMESTAMP              when it began (UTC)
  finished         TIMESTAMP              when it ended (UTC)
  num_questions    INTEGER                questions in the batch
  num_responses    INTEGER                responses in the batch
  num_verdicts     INTEGER                verdicts in the batch
  num_failed       INTEGER                verdicts without a score where one was due
  num_unscorable   INTEGER                responses without a reward
  num_dead_groups  INTEGER                groups whose rewards are all equal, which teach nothing
  metrics          JSON                   everything else that was measured, by name

meta: Bookkeeping: one row about the log itself.
  schema_version   INTEGER                the number of migrations this file has seen
  secret           BLOB                   32 random bytes: the key of the marks that fence responses in judge prompts

spools: Bookkeeping: pieces of the write-ahead spool whose rows are in the tables already, so that none is stored twice.
  segment          VARCHAR                the piece's file name
"""

# Columns that came later: `table.column  TYPE  comment`. Rows of before hold NULL in them.
SECOND = """
responses.control            VARCHAR  the assessment that an improvement saw: own, shuffled (another response's) or none
responses.logprob_sampled    DOUBLE   sum of its tokens' log-probabilities as drawn, in the context it was drawn in
responses.logprob_trained    DOUBLE   the same of the policy before the update, in the context that is trained
rewards.penalty              DOUBLE   what was added to the reward before the baseline, for its length or truncation
rewards.in_baseline          BOOLEAN  whether it counts in the mean and spread of its group
rewards.trained              BOOLEAN  whether the optimizer took it; it counts in the loss's denominators either way
judge_calls.confidence       DOUBLE   of the score in the reply, by its tokens' probabilities; NULL where not asked for
"""

THIRD = """
verdicts.stated              DOUBLE   the confidence as the judge gave it, before its calibration
judge_calls.sample           INTEGER  the number of the sample, from 0, where several votes are asked for
judge_calls.tokens           JSON     tokens of the score: [place, [[written, logprob], [other, logprob], ...]]
"""

# Tables that came later, in the form of FIRST.
THIRD_TABLES = """
human_labels: What people said of responses: the truth that `grape calibrate` holds judges to.
  run              VARCHAR                the run whose response was labelled, as in runs
  response_id      VARCHAR                the response, as in responses
  question_id      VARCHAR                the question, as in questions
  item             VARCHAR                the item's id in the rubric
  labeler          VARCHAR                who labelled it
  score            DOUBLE                 in [0,1], before polarity, as a judge's score
  note             VARCHAR                what the labeler remarked
  created          TIMESTAMP              when it was labelled (UTC)
"""

FOURTH_TABLES = """
preferences: One response preferred to another of its question, by a rubric's reward or by a judge.
  run              VARCHAR                the run of the responses, as in runs
  step             INTEGER                the training step; 0 outside training
  question_id      VARCHAR                the question, as in questions
  category         VARCHAR                the question's category
  chosen_id        VARCHAR                the better response, as in responses
  rejected_id      VARCHAR                the other one
  source           VARCHAR                who preferred it: rubric or judge
  item             VARCHAR                the item that they were compared by; NULL for the whole rubric
  judge            VARCHAR                the judge's name
  margin           DOUBLE                 how much more reward the chosen one has; NULL where no rubric scored them
  probability      DOUBLE                 that it is the better one: a soft label; NULL where nobody said
  consistent       BOOLEAN                whether the judge preferred it in both orders
  calls            VARCHAR                keys of the judge calls behind it, a JSON list; see judge_calls
  created          TIMESTAMP              when it was stored (UTC)

revisions: One round of critique and revision of a response, by a principle of a constitution.
  run              VARCHAR                the run, as in runs
  question_id      VARCHAR                the question, as in questions
  round            INTEGER                1 for the first revision of the initial response
  parent_id        VARCHAR                the response that was criticised, as in responses
  response_id      VARCHAR                the revision, as in responses
  item             VARCHAR                the principle: an item of the constitution
  criterion        VARCHAR                what that principle asks for
  critique         VARCHAR                what is wrong with the response by that principle
  revision         VARCHAR                the text of the revision
  created          TIMESTAMP              when it was made (UTC)
"""

BOOKKEEPING = ("meta", "spools")
LINE = re.compile(r"(?P<indent>  )?(?P<name>\w+)(?::| {2,}(?P<type>\S.*?) {2,}) *(?P<comment>\S.*)")


def quote(text: str) -> str:
    """An SQL string literal."""
    return "'" + text.replace("'", "''") + "'"


def create(text: str) -> str:
    """The SQL that creates the tables of such a text, with their comments."""
    tables: list[tuple[str, str, list[tuple[str, str, str]]]] = []
    for line in filter(None, text.splitlines()):
        match = LINE.fullmatch(line)
        assert match, line
        if match["indent"]:
            tables[-1][2].append((match["name"], match["type"], match["comment"]))
        else:
            tables.append((match["name"], match["comment"], []))
    script = []
    for table, comment, columns in tables:
        script.append(f"CREATE TABLE {table} ({', '.join(f'{name} {type_}' for name, type_, _ in columns)})")
        script.append(f"COMMENT ON TABLE {table} IS {quote(comment)}")
        script.extend(f"COMMENT ON COLUMN {table}.{name} IS {quote(comment)}" for name, _, comment in columns)
    return ";\n".join([*script, ""])


def extend(text: str) -> str:
    """The SQL that adds the columns of such a text to tables that are there, with their comments."""
    script = []
    for line in filter(None, text.splitlines()):
        place, type_, comment = re.split(r" {2,}", line, maxsplit=2)
        table, name = place.split(".")
        script.append(f"ALTER TABLE {table} ADD COLUMN {name} {type_}")
        script.append(f"COMMENT ON COLUMN {table}.{name} IS {quote(comment)}")
    return ";\n".join([*script, ""])


MIGRATIONS: tuple[str, ...] = (
    create(FIRST),
    extend(SECOND),
    create(THIRD_TABLES) + extend(THIRD) + "ALTER TABLE judge_calls DROP COLUMN confidence;\n",  # the tokens say it
    create(FOURTH_TABLES),
)
