-- append: commits one batch of appends, in one round trip.
SELECT * FROM state.append_batch($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19,
  $20, $21, $22, $23, $24, $25, $26, $27, $28, $29, $30, $31, $32, $33, $34, $35, $36, $37, $38, $39, $40, $41, $42,
  $43, $44, $45, $46, $47, $48, $49, $50, $51, $52, $53, $54, $55, $56, $57, $58, $59, $60, $61, $62, $63, $64,
  $65, $66, $67, $68, $69, $70, $71, $72, $73, $74, $75);

-- get_run: one run of the user.
SELECT * FROM state.runs WHERE tenant_id = $1 AND user_id = $2 AND run_id = $3;

-- list_runs: a page of the user's runs, newest first.
SELECT * FROM state.runs
WHERE tenant_id = $1 AND user_id = $2 AND run_id < $3 AND ordinal > 0
  AND ($4 = '' OR agent = $4) AND (cardinality($5::smallint[]) = 0 OR state = ANY ($5))
ORDER BY run_id DESC LIMIT $6;

-- list_runs_of_session: a page of the runs of one session, newest first.
SELECT * FROM state.runs
WHERE tenant_id = $1 AND user_id = $2 AND session_id = $7 AND run_id < $3 AND ordinal > 0
  AND ($4 = '' OR agent = $4) AND (cardinality($5::smallint[]) = 0 OR state = ANY ($5))
ORDER BY run_id DESC LIMIT $6;

-- list_sub_runs: a page of the sub-runs of one run of the user, newest first.
SELECT * FROM state.runs
WHERE tenant_id = $1 AND user_id = $2 AND parent_run_id = $7 AND run_id < $3 AND parent_run_id IS NOT NULL
  AND ($4 = '' OR agent = $4) AND (cardinality($5::smallint[]) = 0 OR state = ANY ($5))
ORDER BY run_id DESC LIMIT $6;

-- circumstances: who holds a run of the user, and what is before it.
SELECT * FROM state.circumstances($1, $2, $3);

-- answer_as: of which roles the approvals of others are shown in this transaction.
SELECT set_config('mainspring.answer_roles', $1, true);

-- get_approval: one approval that the user may see.
SELECT * FROM state.approvals WHERE tenant_id = $1 AND run_id = $2 AND seq = $3;

-- list_approvals: a page of the approvals that the user may see, newest first: the user's own, and others' by role.
SELECT * FROM (
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND user_id = $2 AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
  UNION ALL
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND role = 'operator' AND $7 AND user_id <> $2 AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
  UNION ALL
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND role = 'admin' AND $8 AND user_id <> $2 AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
) AS page ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6;

-- list_open_approvals: the same, of those that are not over.
SELECT * FROM (
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND user_id = $2 AND decision = 0 AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
  UNION ALL
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND role = 'operator' AND $7 AND user_id <> $2 AND decision = 0
     AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
  UNION ALL
  (SELECT * FROM state.approvals
   WHERE tenant_id = $1 AND role = 'admin' AND $8 AND user_id <> $2 AND decision = 0
     AND (create_time, run_id, seq) < ($3, $4, $5)
   ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6)
) AS page ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6;

-- list_approvals_of_run: a page of one run's approvals that the user may see, newest first.
SELECT * FROM state.approvals
WHERE tenant_id = $1 AND run_id = $2 AND (create_time, run_id, seq) < ($3, $4, $5) AND ($7 OR decision = 0)
ORDER BY create_time DESC, run_id DESC, seq DESC LIMIT $6;

-- list_run_metrics: a page of what the tenant's ended runs cost, newest first.
SELECT * FROM state.run_metrics
WHERE tenant_id = $1 AND run_id < $2 AND run_id >= $3 AND ($4 = '' OR agent = $4) ORDER BY run_id DESC LIMIT $5;

-- get_run_metrics: what one ended run of the tenant cost.
SELECT * FROM state.run_metrics
WHERE tenant_id = $1 AND run_id = $2 AND run_id < $3 AND run_id >= $4 AND ($5 = '' OR agent = $5);

-- open_approvals_of: the open approvals of one run that the user may see.
SELECT * FROM state.approvals WHERE tenant_id = $1 AND run_id = $2 AND decision = 0 ORDER BY seq LIMIT $3;

-- places_of: in which lines a run of the user stands.
SELECT * FROM state.lines_of($1, $2, $3);

-- open_sub_runs: sub-runs of one run of the user that have not ended.
SELECT run_id FROM state.runs
WHERE tenant_id = $1 AND parent_run_id = $2 AND parent_run_id IS NOT NULL AND state < 5 ORDER BY run_id LIMIT $3;

-- due_webhooks: takes ends that somebody has to be told of.
SELECT url, credential, attempts, (run).* FROM state.due_webhooks($1, $2);

-- settle_webhook: says what became of telling.
SELECT state.settle_webhook($1, $2, $3, $4, $5);

-- read_events: a page of a run's log, in order; it ends when so many bytes are reached.
SELECT seq, event FROM (
  SELECT seq, event, sum(octet_length(event)) OVER (ORDER BY seq) - octet_length(event) AS bytes_before
  FROM state.events
  WHERE tenant_id = $1 AND user_id = $2 AND run_id = $3
    -- Seqs have no gap: so the page alone is read, whatever the plan and however long the log.
    AND seq > $4 AND seq <= least($4, 9223372036854775807 - $5) + $5 ORDER BY seq LIMIT $5
) AS page WHERE bytes_before < $6 ORDER BY seq;

-- create_session: makes a session, unless the user has one of this id.
INSERT INTO state.sessions (tenant_id, user_id, session_id, policy, title, request_id)
VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT DO NOTHING RETURNING *;

-- get_session: one session of the user.
SELECT * FROM state.sessions WHERE tenant_id = $1 AND user_id = $2 AND session_id = $3;

-- list_sessions: a page of the user's sessions, newest first.
SELECT * FROM state.sessions
WHERE tenant_id = $1 AND user_id = $2 AND (create_time, session_id) < ($3, $4) AND create_time > '-infinity'
ORDER BY create_time DESC, session_id DESC LIMIT $5;

-- put_input: stores what is asked of a run, once per request id.
SELECT reason, state, holder, (input).*, (approval).decision, (approval).answered_by, (approval).expires_time,
  (approval).role
FROM state.ask($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13);

-- beat: stores an executor's beat.
SELECT state.beat($1, $2, $3);

-- shorten_lease: an executor's stream broke, or it leaves.
SELECT state.shorten_lease($1, $2, $3);

-- disown: claims may not have been handed over.
SELECT state.disown($1, $2);

-- claim: takes runs that nobody drives.
SELECT (run).*, handed_back FROM state.claim_runs($1, $2, $3, $4, $5, $6, $7);

-- next_due: in how many seconds the next run is due.
SELECT state.next_due();

-- inputs_of: the unconsumed inputs of runs.
SELECT * FROM state.inputs_of($1, $2);

-- inputs_for: the unconsumed inputs of the runs that executors hold.
SELECT executor_id, (input).* FROM state.inputs_for($1, $2);

-- tidy_ready: forgets claimables of ended runs.
SELECT state.tidy_ready();

-- last_seqs: how far the logs of followed runs have come.
SELECT * FROM state.last_seqs($1, $2);

-- read_log: a page of the log of a run that is followed here.
SELECT * FROM state.read_log($1, $2, $3, $4, $5);

-- meet_processes: says that this process lives, and asks who else does and what time it is.
SELECT * FROM state.meet_processes($1);

-- leave_processes: says that this process has left.
SELECT state.leave_processes($1);

-- make_partitions: makes the log's partitions some weeks ahead.
SELECT state.make_partitions($1);
