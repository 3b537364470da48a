-- Control, waiting, approvals, sub-runs, webhooks and what runs cost.
-- depends: 0002_tell_tenants_of_last_seqs

-- migrate: apply

-- The release before goes on beside this one: its functions stay callable as they were. `append` and `claim` are the
-- new ones by their old names; `put_input` and `take_run` are of no use to this release, and go with the next one.

-- parent_run_id, root_run_id, parent_call_id, depth: of a sub-run. webhook_*: who is told of its end. model_calls to
-- waiting_ms: what its holder counted, with its end. As ever, no index on what an append changes.
ALTER TABLE state.runs
  ADD COLUMN parent_run_id uuid,
  ADD COLUMN root_run_id uuid,
  ADD COLUMN parent_call_id text,
  ADD COLUMN source_run_id uuid,
  ADD COLUMN source_seq bigint NOT NULL DEFAULT 0,
  ADD COLUMN webhook_url text,
  ADD COLUMN webhook_credential text,
  ADD COLUMN waiting_ms double precision,
  ADD COLUMN model_calls integer,
  ADD COLUMN tool_calls integer,
  ADD COLUMN tool_errors integer,
  ADD COLUMN cache_hits integer,
  ADD COLUMN retries integer,
  ADD COLUMN depth smallint NOT NULL DEFAULT 0,
  ADD COLUMN attempt integer NOT NULL DEFAULT 1,
  ADD COLUMN priority smallint NOT NULL DEFAULT 0;

CREATE INDEX runs_of_parent ON state.runs (tenant_id, parent_run_id, run_id) WHERE parent_run_id IS NOT NULL;

-- kind: the name of what is asked in RunInput.
ALTER TABLE state.inputs ADD COLUMN kind text COLLATE "C" NOT NULL DEFAULT 'cancel';

-- handed_back: of a claim, that the former holder had let the run go in the middle.
ALTER TABLE state.leases ADD COLUMN handed_back boolean NOT NULL DEFAULT false;

-- What people are asked: the requests and answers of all logs in one place, and the arbiter of who answers first.
-- decision 0: open. seq: of approval_requested.
CREATE TABLE state.approvals (
  run_id uuid NOT NULL,
  seq bigint NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  expires_time timestamptz,
  resolve_time timestamptz,
  kind smallint NOT NULL,
  decision smallint NOT NULL DEFAULT 0,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  session_id text COLLATE "C" NOT NULL,
  role text COLLATE "C" NOT NULL,
  agent text NOT NULL,
  call_id text NOT NULL,
  title text NOT NULL,
  answered_by text NOT NULL DEFAULT '',
  arguments bytea NOT NULL,
  answer_schema bytea NOT NULL,
  data bytea NOT NULL DEFAULT '',
  PRIMARY KEY (tenant_id, run_id, seq)
);

CREATE INDEX approvals_own ON state.approvals (tenant_id, user_id, create_time, run_id, seq);
CREATE INDEX approvals_own_open ON state.approvals (tenant_id, user_id, create_time, run_id, seq) WHERE decision = 0;
CREATE INDEX approvals_role ON state.approvals (tenant_id, role, create_time, run_id, seq);
CREATE INDEX approvals_role_open ON state.approvals (tenant_id, role, create_time, run_id, seq) WHERE decision = 0;

-- Ends of runs that somebody has to be told of; a row goes when that was done. due_time null: nobody tries any more.
CREATE TABLE state.webhooks (
  run_id uuid NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  due_time timestamptz DEFAULT now(),
  attempts integer NOT NULL DEFAULT 0,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  url text NOT NULL,
  credential text NOT NULL,
  last_error text NOT NULL DEFAULT '',
  PRIMARY KEY (tenant_id, run_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX webhooks_due ON state.webhooks (due_time);

ALTER TABLE state.approvals ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.webhooks ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY engine ON state.approvals TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.webhooks TO mainspring_state_engine USING (true) WITH CHECK (true);

CREATE POLICY own ON state.approvals USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
-- Those of others that the caller's role may answer.
CREATE POLICY answerable ON state.approvals USING (
  tenant_id = current_setting('mainspring.tenant_id', true)
  AND role = ANY (string_to_array(current_setting('mainspring.answer_roles', true), ',')));

GRANT SELECT, INSERT, UPDATE, DELETE ON state.approvals, state.webhooks TO mainspring_state_engine;
GRANT SELECT ON state.approvals TO mainspring_state;

-- What each ended run cost and how it went: there from its terminal commit on, in its own row, as one more in another
-- table would make every end dearer by a sixth. It shows a tenant's to the tenant's operators, whosever they are: it is
-- read with the rights of its owner, who sees all; nothing of what was said is in it.
CREATE VIEW state.run_metrics WITH (security_barrier) AS
SELECT r.tenant_id, r.run_id, r.user_id, r.agent, r.agent_version, r.state, r.create_time, r.end_time, r.trace_id,
  r.stages, coalesce(r.error ->> 'reason', '') AS error_reason,
  1e3 * date_part('epoch', r.end_time - r.create_time) AS duration_ms,
  1e3 * date_part('epoch', coalesce(r.start_time, r.end_time) - r.create_time) AS queue_ms,
  coalesce(r.waiting_ms, 0) AS waiting_ms, coalesce(r.model_calls, 0) AS model_calls,
  coalesce(r.tool_calls, 0) AS tool_calls, coalesce(r.tool_errors, 0) AS tool_errors,
  coalesce(r.cache_hits, 0) AS cache_hits, coalesce(r.retries, 0) AS retries, r.takeovers AS recoveries,
  coalesce((r.usage ->> 'input_tokens')::bigint, 0) AS input_tokens,
  coalesce((r.usage ->> 'output_tokens')::bigint, 0) AS output_tokens,
  coalesce((r.usage ->> 'cost_usd')::double precision, 0) AS cost_usd
FROM state.runs r
WHERE r.state >= 5 AND r.tenant_id = current_setting('mainspring.tenant_id', true);

GRANT SELECT ON state.run_metrics TO mainspring_state;

-- Whether an input of this kind makes a run of this state that nobody holds claimable; others are kept until it is.
CREATE FUNCTION state.wakes(run_state integer, kind text) RETURNS boolean
LANGUAGE sql IMMUTABLE PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $body$
  SELECT CASE run_state WHEN 1 THEN kind = 'cancel' WHEN 4 THEN kind IN ('cancel', 'resume') ELSE true END
$body$;

-- A serialized RunInput with nothing but sub_run_ended.
CREATE FUNCTION state.sub_run_ended(sub_run_id uuid, call_id text, end_state integer) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  call bytea := convert_to(call_id, 'UTF8');
  fields bytea := '\x0a24' || convert_to(sub_run_id::text, 'UTF8') || '\x12' || state.varint(length(call)) || call
    || '\x18' || state.varint(end_state);
BEGIN
  RETURN '\x7a' || state.varint(length(fields)) || fields;
END
$body$;

-- Commits one batch of appends: no run, session or idempotency key twice. Items 1 to `create_count` are creates, of
-- roots up to `root_count` and of sub-runs behind it; those from `end_first` on are terminal. An item may have no
-- event, and to_state 0 leaves the state as it is. Arrays are read by subscript (plpgsql holds them expanded), so that
-- no plan joins arrays and every table is reached by its key, whatever its statistics say; what few appends have comes
-- in arrays of its own, which are empty or null where none has it.
CREATE FUNCTION state.append_batch(
  tenants text[], runs uuid[], append_ids uuid[], expected_seqs bigint[], epochs bigint[],
  from_states integer[], to_states integer[], progresses boolean[],
  event_firsts integer[], event_lasts integer[], types text[], events bytea[], new_event_time timestamptz,
  create_count integer, users text[], session_ids text[], policies integer[], agents text[], versions text[],
  run_inputs bytea[], keys text[], hashes bytea[], executors text[], deadlines timestamptz[], traces text[],
  end_first integer, results bytea[], errors text[], all_stages text[], usages text[],
  consumed_items integer[], consumed_requests text[], interrupt_payload bytea,
  root_count integer, parents uuid[], roots uuid[], parent_calls text[], depths integer[],
  sources uuid[], source_seqs bigint[], attempts integer[], priorities integer[], hook_urls text[],
  hook_credentials text[],
  release_items integer[], release_dues timestamptz[],
  model_counts integer[], tool_counts integer[], error_counts integer[], cache_counts integer[],
  retry_counts integer[], waitings double precision[],
  ask_items integer[], ask_seqs bigint[], ask_kinds integer[], ask_roles text[], ask_titles text[], ask_calls text[],
  ask_arguments bytea[], ask_schemas bytea[], ask_expires timestamptz[],
  resolve_items integer[], resolve_seqs bigint[], resolve_decisions integer[], resolve_by text[], resolve_data bytea[],
  stands boolean[], queue_onlys boolean[], dues timestamptz[], weights integer[], backlogs integer[],
  backlog_least integer, cap_items integer[], cap_scopes text[], cap_limits integer[],
  OUT made integer[], OUT made_running boolean[], OUT made_ordinals bigint[],
  OUT hit integer[], OUT hit_users text[], OUT hit_ordinals bigint[], OUT hit_states integer[],
  OUT missed integer[], OUT missed_reasons text[], OUT missed_runs uuid[], OUT missed_states integer[],
  OUT missed_seqs bigint[], OUT missed_ordinals bigint[], OUT became_ready boolean,
  OUT told_holders text[], OUT told_tenants text[], OUT told_users text[], OUT told_runs uuid[],
  OUT told_requests text[], OUT told_payloads bytea[]
)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET plan_cache_mode = force_generic_plan
AS $body$
DECLARE
  item_count integer := cardinality(runs);
  moved integer[];
  unstarted integer[];
  sub_ended integer[];
  hooked integer[];
  has_due boolean;
  holder text;
  new_payload bytea;
  entry record;
  next_run uuid;
  led text;
  standing integer[];
  begun integer[];
  capped integer[];
  next_tenants text[] := '{}';
  next_runs uuid[] := '{}';
  woken_tenants text[] := '{}';
  woken_runs uuid[] := '{}';
BEGIN
  missed := '{}';
  became_ready := false;

  IF create_count > 0 THEN
    -- A repeat is never told RUNNING once somebody claimed the run: that would say that its creator holds it.
    FOR entry IN
      SELECT i, r.append_id = append_ids[i] AS repeated, r.run_id, r.last_seq, r.ordinal,
        CASE WHEN r.state = 2 AND r.epoch > 1 THEN 1 ELSE r.state END AS state
      FROM generate_series(1, create_count) AS i
      JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
    LOOP
      missed := missed || entry.i;
      missed_reasons := missed_reasons || CASE WHEN entry.repeated THEN 'repeated' ELSE 'exists' END;
      missed_runs := missed_runs || entry.run_id;
      missed_states := missed_states || entry.state::integer;
      missed_seqs := missed_seqs || entry.last_seq;
      missed_ordinals := missed_ordinals || entry.ordinal;
    END LOOP;
    IF array_length(keys, 1) > 0 THEN
      FOR entry IN
        SELECT i, k.request_hash = hashes[i] AS same, r.run_id, r.state, r.last_seq, r.ordinal
        FROM generate_series(1, create_count) AS i
        JOIN state.idempotency_keys k
          ON k.tenant_id = tenants[i] AND k.user_id = users[i] AND k.idempotency_key = keys[i]
        JOIN state.runs r ON r.tenant_id = k.tenant_id AND r.run_id = k.run_id
        WHERE i <> ALL (missed)
      LOOP
        missed := missed || entry.i;
        missed_reasons := missed_reasons || CASE WHEN entry.same THEN 'key_repeated' ELSE 'key_reused' END;
        missed_runs := missed_runs || entry.run_id;
        missed_states := missed_states || entry.state::integer;
        missed_seqs := missed_seqs || entry.last_seq;
        missed_ordinals := missed_ordinals || entry.ordinal;
      END LOOP;
    END IF;

    IF create_count >= backlog_least OR EXISTS (
      SELECT FROM state.shares s
      WHERE s.tenant_id = ANY (tenants[1:root_count]) AND s.queued + root_count > backlog_least) THEN
      FOR entry IN
        SELECT i FROM unnest(state.overflowing(tenants[1:root_count], users, session_ids, queue_onlys, dues, cap_items,
          cap_scopes, cap_limits, backlogs, missed)) AS i
      LOOP
        missed := missed || entry.i;
        missed_reasons := missed_reasons || 'backlog'::text;
        missed_runs := missed_runs || runs[entry.i];
        missed_states := missed_states || 0;
        missed_seqs := missed_seqs || backlogs[entry.i]::bigint;
        missed_ordinals := missed_ordinals || 0::bigint;
      END LOOP;
    END IF;

    WITH turns AS (
      INSERT INTO state.sessions AS s (tenant_id, user_id, session_id, policy, run_count, head_run_id, last_run_id)
      SELECT tenants[i], users[i], session_ids[i], policies[i], 1, CASE WHEN policies[i] <> 4 THEN runs[i] END, runs[i]
      FROM generate_series(1, root_count) AS i
      WHERE i <> ALL (missed)
      ON CONFLICT (tenant_id, user_id, session_id) DO UPDATE SET
        run_count = s.run_count + 1,
        update_time = now(),
        last_run_id = excluded.last_run_id,
        head_run_id = CASE WHEN s.policy <> 4 THEN coalesce(s.head_run_id, excluded.last_run_id) END,
        waiting = s.waiting + CASE WHEN s.policy <> 4 AND s.head_run_id IS NOT NULL THEN 1 ELSE 0 END
      WHERE s.policy <> 2 OR s.head_run_id IS NULL
      RETURNING array_position(runs, s.last_run_id) AS i, s.run_count AS ordinal,
        s.policy = 4 OR s.head_run_id = s.last_run_id AS has_turn
    ), line AS (
      SELECT i, ordinal, has_turn, has_turn AND NOT coalesce(stands[i], false) AS is_running FROM turns
    ), made_runs AS (
      INSERT INTO state.runs (run_id, append_id, ordinal, last_seq, start_time, deadline, state, tenant_id, user_id,
        session_id, agent, agent_version, trace_id, input, source_run_id, source_seq, attempt, priority, webhook_url,
        webhook_credential, due_time, caps, cap_limits)
      SELECT runs[i], append_ids[i], ordinal, is_running::integer, CASE WHEN is_running THEN now() END, deadlines[i],
        1 + is_running::integer, tenants[i], users[i], session_ids[i], agents[i], versions[i], traces[i], run_inputs[i],
        sources[i], coalesce(source_seqs[i], 0), coalesce(attempts[i], 1), coalesce(priorities[i], 0), hook_urls[i],
        hook_credentials[i], dues[i],
        CASE WHEN stands[i] THEN (
          SELECT array_agg(cap_scopes[k] ORDER BY k) FROM generate_subscripts(cap_items, 1) AS k
          WHERE cap_items[k] = i) END,
        CASE WHEN stands[i] THEN (
          SELECT array_agg(cap_limits[k] ORDER BY k) FROM generate_subscripts(cap_items, 1) AS k
          WHERE cap_items[k] = i) END
      FROM line
    ), leased AS (
      INSERT INTO state.leases (run_id, epoch, tenant_id, executor_id)
      SELECT runs[i], 1, tenants[i], executors[i] FROM line WHERE is_running
    ), logged AS (
      INSERT INTO state.events (run_id, seq, event_time, append_id, tenant_id, user_id, type, event)
      SELECT runs[i], 1, new_event_time, append_ids[i], tenants[i], users[i], types[event_firsts[i]],
        events[event_firsts[i]] || state.ordinal_field(ordinal)
      FROM line WHERE is_running
    ), lined AS (
      INSERT INTO state.queued (run_id, ordinal, tenant_id, user_id, session_id)
      SELECT runs[i], ordinal, tenants[i], users[i], session_ids[i] FROM line WHERE NOT has_turn
    ), due AS (
      INSERT INTO state.ready (run_id, due_time, tenant_id)
      SELECT runs[i], deadlines[i], tenants[i] FROM line WHERE NOT is_running AND deadlines[i] IS NOT NULL
    ), keyed AS (
      INSERT INTO state.idempotency_keys (run_id, tenant_id, user_id, idempotency_key, request_hash)
      SELECT runs[i], tenants[i], users[i], keys[i], hashes[i] FROM line WHERE keys[i] <> ''
    )
    SELECT array_agg(i), array_agg(is_running), array_agg(ordinal), array_agg(i) FILTER (WHERE has_turn AND stands[i])
    INTO made, made_running, made_ordinals, standing FROM line;

    -- Refused by the session's policy.
    IF coalesce(cardinality(made), 0) + cardinality(missed) < create_count THEN
      FOR entry IN SELECT i FROM generate_series(1, root_count) AS i
        WHERE i <> ALL (missed) AND i <> ALL (coalesce(made, '{}')) LOOP
        missed := missed || entry.i;
        missed_reasons := missed_reasons || 'busy'::text;
        missed_runs := missed_runs || runs[entry.i];
        missed_states := missed_states || 0;
        missed_seqs := missed_seqs || 0::bigint;
        missed_ordinals := missed_ordinals || 0::bigint;
      END LOOP;
    END IF;

    -- Policy interrupt: a run that found another before it asks that one to end.
    IF made_running IS NOT NULL AND NOT (true = ALL (made_running)) THEN
      WITH head AS (
        SELECT s.tenant_id, s.head_run_id, s.user_id, runs[i] AS by_run
        FROM generate_series(1, root_count) AS i
        JOIN state.sessions s ON s.tenant_id = tenants[i] AND s.user_id = users[i] AND s.session_id = session_ids[i]
        WHERE s.policy = 3 AND i = ANY (made) AND s.head_run_id <> runs[i]
      ), asked AS (
        INSERT INTO state.inputs (run_id, tenant_id, user_id, request_id, requested_by, payload)
        SELECT head_run_id, tenant_id, user_id, by_run::text, user_id, interrupt_payload FROM head
        ON CONFLICT DO NOTHING
      )
      SELECT array_agg(tenant_id), array_agg(head_run_id) INTO woken_tenants, woken_runs FROM head;
    END IF;

    -- Sub-runs stand in no line. One whose parent has ended would be nobody's.
    IF create_count > root_count THEN
      FOR entry IN
        SELECT i, r.run_id, r.state FROM generate_series(root_count + 1, create_count) AS i
        LEFT JOIN state.runs r
          ON r.tenant_id = tenants[i] AND r.run_id = parents[i - root_count] AND r.user_id = users[i]
        WHERE i <> ALL (missed) AND coalesce(r.state, 5) >= 5
      LOOP
        missed := missed || entry.i;
        missed_reasons := missed_reasons || CASE WHEN entry.run_id IS NULL THEN 'unknown' ELSE 'ended' END;
        missed_runs := missed_runs || parents[entry.i - root_count];
        missed_states := missed_states || coalesce(entry.state, 0)::integer;
        missed_seqs := missed_seqs || 0::bigint;
        missed_ordinals := missed_ordinals || 0::bigint;
      END LOOP;
      WITH fresh AS (
        SELECT i FROM generate_series(root_count + 1, create_count) AS i WHERE i <> ALL (missed)
      ), made_runs AS (
        INSERT INTO state.runs (run_id, append_id, ordinal, last_seq, start_time, deadline, state, tenant_id, user_id,
          session_id, agent, agent_version, trace_id, input, source_run_id, source_seq, attempt, priority, webhook_url,
          webhook_credential, parent_run_id, root_run_id, parent_call_id, depth)
        SELECT runs[i], append_ids[i], 0, 1, now(), deadlines[i], 2, tenants[i], users[i], session_ids[i], agents[i],
          versions[i], traces[i], run_inputs[i], sources[i], coalesce(source_seqs[i], 0), coalesce(attempts[i], 1),
          coalesce(priorities[i], 0), hook_urls[i], hook_credentials[i], parents[i - root_count], roots[i - root_count],
          parent_calls[i - root_count], depths[i - root_count]
        FROM fresh
      ), leased AS (
        INSERT INTO state.leases (run_id, epoch, tenant_id, executor_id)
        SELECT runs[i], 1, tenants[i], executors[i] FROM fresh
      ), logged AS (
        INSERT INTO state.events (run_id, seq, event_time, append_id, tenant_id, user_id, type, event)
        SELECT runs[i], 1, new_event_time, append_ids[i], tenants[i], users[i], types[event_firsts[i]],
          events[event_firsts[i]] || state.ordinal_field(0)
        FROM fresh
      )
      SELECT made || array_agg(i), made_running || array_agg(true), made_ordinals || array_agg(0::bigint)
      INTO made, made_running, made_ordinals FROM fresh;
    END IF;
  END IF;

  IF item_count > create_count THEN
    WITH changed AS (
      UPDATE state.runs r SET
        last_seq = expected_seqs[i] + event_lasts[i] - event_firsts[i] + 1,
        state = CASE WHEN to_states[i] = 0 THEN r.state ELSE to_states[i] END,
        stalled = CASE WHEN progresses[i] THEN 0 ELSE r.stalled END,
        start_time = CASE WHEN expected_seqs[i] = 0 AND i < end_first AND event_lasts[i] >= event_firsts[i]
          THEN now() ELSE r.start_time END,
        end_time = CASE WHEN i >= end_first THEN now() END,
        released_time = CASE WHEN i >= end_first THEN now() END,
        result = results[i - end_first + 1],
        error = errors[i - end_first + 1]::jsonb,
        stages = all_stages[i - end_first + 1]::jsonb,
        usage = usages[i - end_first + 1]::jsonb,
        model_calls = model_counts[i - end_first + 1],
        tool_calls = tool_counts[i - end_first + 1],
        tool_errors = error_counts[i - end_first + 1],
        cache_hits = cache_counts[i - end_first + 1],
        retries = retry_counts[i - end_first + 1],
        waiting_ms = waitings[i - end_first + 1]
      FROM generate_series(create_count + 1, item_count) AS i
      WHERE r.tenant_id = tenants[i] AND r.run_id = runs[i]
        AND r.last_seq = expected_seqs[i] AND r.epoch = epochs[i] AND (from_states[i] >> r.state) & 1 = 1
      RETURNING i, r.tenant_id, r.run_id, r.user_id, r.session_id, r.ordinal, r.start_time, r.state, r.parent_run_id,
        r.webhook_url, r.caps IS NOT NULL AS has_caps
    ), logged AS (
      INSERT INTO state.events (run_id, seq, event_time, append_id, tenant_id, user_id, type, event)
      SELECT runs[i], expected_seqs[i] + k - event_firsts[i] + 1, new_event_time, append_ids[i], tenants[i], user_id,
        types[k], CASE types[k] WHEN 'agent_started' THEN events[k] || state.ordinal_field(ordinal) ELSE events[k] END
      FROM changed CROSS JOIN LATERAL generate_series(event_firsts[i], event_lasts[i]) AS k
    ), released AS (
      DELETE FROM state.leases l USING changed
      WHERE i >= end_first AND l.tenant_id = tenants[i] AND l.run_id = runs[i]
    ), freed AS (
      UPDATE state.sessions s SET head_run_id = NULL FROM changed
      WHERE i >= end_first AND s.tenant_id = tenants[i] AND s.user_id = changed.user_id
        AND s.session_id = changed.session_id AND s.head_run_id = runs[i]
      RETURNING i, s.waiting
    )
    SELECT array_agg(i), array_agg(user_id), array_agg(ordinal), array_agg(state::integer),
      array_agg(i) FILTER (WHERE i >= end_first AND start_time IS NULL),
      array_agg(i) FILTER (WHERE i >= end_first AND parent_run_id IS NOT NULL),
      array_agg(i) FILTER (WHERE i >= end_first AND webhook_url IS NOT NULL),
      (SELECT array_agg(freed.i) FILTER (WHERE freed.waiting > 0) FROM freed),
      array_agg(i) FILTER (WHERE expected_seqs[i] = 0 AND event_lasts[i] >= event_firsts[i] AND ordinal > 0),
      array_agg(i) FILTER (WHERE has_caps AND (i >= end_first OR state IN (3, 4) AND i = ANY (release_items)))
    INTO hit, hit_users, hit_ordinals, hit_states, unstarted, sub_ended, hooked, moved, begun, capped FROM changed;

    IF cardinality(consumed_items) > 0 THEN
      UPDATE state.inputs n SET consumed_seq = expected_seqs[i] + event_lasts[i] - event_firsts[i] + 1
      FROM (
        SELECT consumed_items[k] AS i, consumed_requests[k] AS request FROM generate_subscripts(consumed_items, 1) AS k
      ) AS consumed
      WHERE consumed.i = ANY (hit) AND n.tenant_id = tenants[i] AND n.run_id = runs[i] AND n.request_id = request
        AND n.consumed_seq IS NULL;
    END IF;

    IF cardinality(ask_items) > 0 THEN
      INSERT INTO state.approvals (run_id, seq, expires_time, kind, tenant_id, user_id, session_id, agent, call_id,
        role, title, arguments, answer_schema)
      SELECT r.run_id, ask_seqs[k], ask_expires[k], ask_kinds[k], r.tenant_id, r.user_id, r.session_id, r.agent,
        ask_calls[k], ask_roles[k], ask_titles[k], ask_arguments[k], ask_schemas[k]
      FROM generate_subscripts(ask_items, 1) AS k
      JOIN state.runs r ON r.tenant_id = tenants[ask_items[k]] AND r.run_id = runs[ask_items[k]]
      WHERE ask_items[k] = ANY (hit);
    END IF;

    -- Those that somebody answered are decided already.
    IF cardinality(resolve_items) > 0 THEN
      UPDATE state.approvals a SET decision = resolve_decisions[k], answered_by = resolve_by[k], data = resolve_data[k],
        resolve_time = now()
      FROM generate_subscripts(resolve_items, 1) AS k
      WHERE resolve_items[k] = ANY (hit) AND a.tenant_id = tenants[resolve_items[k]]
        AND a.run_id = runs[resolve_items[k]] AND a.seq = resolve_seqs[k] AND a.decision = 0;
    END IF;

    IF hooked IS NOT NULL THEN
      INSERT INTO state.webhooks (run_id, tenant_id, user_id, url, credential)
      SELECT r.run_id, r.tenant_id, r.user_id, r.webhook_url, r.webhook_credential
      FROM unnest(hooked) AS i JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i];
    END IF;

    -- A sub-run's end is an input of its parent, whose row is locked as put_input does.
    IF sub_ended IS NOT NULL THEN
      FOR entry IN
        SELECT p.tenant_id, p.run_id, p.user_id, p.state, c.run_id AS sub_run_id, c.parent_call_id,
          c.state AS end_state
        FROM unnest(sub_ended) AS i
        JOIN state.runs c ON c.tenant_id = tenants[i] AND c.run_id = runs[i]
        JOIN state.runs p ON p.tenant_id = c.tenant_id AND p.run_id = c.parent_run_id
        ORDER BY p.tenant_id, p.run_id FOR NO KEY UPDATE OF p
      LOOP
        CONTINUE WHEN entry.state >= 5;
        new_payload := state.sub_run_ended(entry.sub_run_id, entry.parent_call_id, entry.end_state);
        INSERT INTO state.inputs (run_id, create_time, tenant_id, user_id, request_id, requested_by, kind, payload)
        VALUES (entry.run_id, clock_timestamp(), entry.tenant_id, entry.user_id, entry.sub_run_id::text, entry.user_id,
          'sub_run_ended', new_payload)
        ON CONFLICT DO NOTHING;
        CONTINUE WHEN NOT FOUND;
        SELECT l.executor_id INTO holder FROM state.leases l
        WHERE l.tenant_id = entry.tenant_id AND l.run_id = entry.run_id;
        IF FOUND THEN
          told_holders := told_holders || holder;
          told_tenants := told_tenants || entry.tenant_id;
          told_users := told_users || entry.user_id;
          told_runs := told_runs || entry.run_id;
          told_requests := told_requests || entry.sub_run_id::text;
          told_payloads := told_payloads || new_payload;
        ELSIF state.wakes(entry.state, 'sub_run_ended') THEN
          woken_tenants := woken_tenants || entry.tenant_id;
          woken_runs := woken_runs || entry.run_id;
        END IF;
      END LOOP;
    END IF;

    -- The holder lets go. The run's row is locked, so that an input either is seen here or sees that nobody holds it.
    IF cardinality(release_items) > 0 THEN
      WITH released AS (
        SELECT r.tenant_id, r.run_id, CASE
          WHEN EXISTS (
            SELECT FROM state.inputs n WHERE n.tenant_id = r.tenant_id AND n.run_id = r.run_id
              AND n.consumed_seq IS NULL AND state.wakes(r.state, n.kind)) THEN now()
          ELSE least(release_dues[k], r.deadline) END AS due_time
        FROM generate_subscripts(release_items, 1) AS k
        JOIN state.runs r ON r.tenant_id = tenants[release_items[k]] AND r.run_id = runs[release_items[k]]
        WHERE release_items[k] = ANY (hit) AND r.state < 5
      ), left_alone AS (
        DELETE FROM state.leases l USING released WHERE l.tenant_id = released.tenant_id AND l.run_id = released.run_id
      ), due AS (
        INSERT INTO state.ready (run_id, due_time, tenant_id)
        SELECT run_id, due_time, tenant_id FROM released WHERE due_time IS NOT NULL
        ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time)
      )
      SELECT bool_or(due_time <= now()) INTO has_due FROM released;
      became_ready := became_ready OR coalesce(has_due, false);
    END IF;

    -- A run that ended while it stood in line leaves it; the line moves on if its turn came in this very moment. The
    -- session is locked first, as whoever moves a line does.
    IF unstarted IS NOT NULL THEN
      PERFORM FROM state.sessions s WHERE (s.tenant_id, s.user_id, s.session_id) IN (
        SELECT r.tenant_id, r.user_id, r.session_id FROM unnest(unstarted) AS i
        JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i])
      ORDER BY s.tenant_id, s.user_id, s.session_id FOR UPDATE;
      WITH gone AS (
        DELETE FROM state.queued q USING unnest(unstarted) AS i, state.runs r
        WHERE r.tenant_id = tenants[i] AND r.run_id = runs[i] AND q.tenant_id = r.tenant_id AND q.user_id = r.user_id
          AND q.session_id = r.session_id AND q.ordinal = r.ordinal
        RETURNING q.tenant_id, q.user_id, q.session_id
      )
      UPDATE state.sessions s SET waiting = s.waiting - gone.count
      FROM (SELECT tenant_id, user_id, session_id, count(*) FROM gone GROUP BY 1, 2, 3) AS gone
      WHERE s.tenant_id = gone.tenant_id AND s.user_id = gone.user_id AND s.session_id = gone.session_id;
      WITH freed AS (
        UPDATE state.sessions s SET head_run_id = NULL FROM unnest(unstarted) AS i
        JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
        WHERE s.tenant_id = r.tenant_id AND s.user_id = r.user_id AND s.session_id = r.session_id
          AND s.head_run_id = r.run_id
        RETURNING i, s.waiting
      )
      SELECT moved || array_agg(i) FILTER (WHERE waiting > 0) INTO moved FROM freed;
    END IF;

    -- The session's line moves.
    IF moved IS NOT NULL THEN
      FOR entry IN
        SELECT r.tenant_id, r.user_id, r.session_id FROM unnest(moved) AS i
        JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
      LOOP
        DELETE FROM state.queued q
        WHERE q.tenant_id = entry.tenant_id AND q.user_id = entry.user_id AND q.session_id = entry.session_id
          AND q.ordinal = (
            SELECT first.ordinal FROM state.queued first
            WHERE first.tenant_id = entry.tenant_id AND first.user_id = entry.user_id
              AND first.session_id = entry.session_id
            ORDER BY first.ordinal LIMIT 1)
        RETURNING q.run_id INTO next_run;
        CONTINUE WHEN next_run IS NULL;
        UPDATE state.sessions s SET head_run_id = next_run, waiting = s.waiting - 1
        WHERE s.tenant_id = entry.tenant_id AND s.user_id = entry.user_id AND s.session_id = entry.session_id;
        next_tenants := next_tenants || entry.tenant_id;
        next_runs := next_runs || next_run;
      END LOOP;
    END IF;

    -- Why the others were not accepted. A repeat is found by its append id behind the seq that it expected.
    IF coalesce(cardinality(hit), 0) < item_count - create_count THEN
      FOR entry IN
        SELECT i, r.run_id, r.state, r.last_seq, r.ordinal, r.epoch, e.append_id
        FROM generate_series(create_count + 1, item_count) AS i
        LEFT JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
        LEFT JOIN state.events e ON e.tenant_id = tenants[i] AND e.run_id = runs[i] AND e.seq = expected_seqs[i] + 1
        WHERE i <> ALL (coalesce(hit, '{}'))
      LOOP
        missed := missed || entry.i;
        missed_reasons := missed_reasons || CASE
          WHEN entry.run_id IS NULL THEN 'unknown'
          WHEN entry.append_id = append_ids[entry.i] THEN 'repeated'
          WHEN entry.last_seq <> expected_seqs[entry.i] OR entry.epoch <> epochs[entry.i] THEN 'stale'
          WHEN entry.state >= 5 THEN 'ended'
          ELSE 'illegal' END;
        missed_runs := missed_runs || runs[entry.i];
        missed_states := missed_states || coalesce(entry.state, 0)::integer;
        missed_seqs := missed_seqs || coalesce(entry.last_seq, 0);
        missed_ordinals := missed_ordinals || coalesce(entry.ordinal, 0);
      END LOOP;
    END IF;
  END IF;

  -- Lines, slots and what is QUEUED, under the locks of their tenants' shares: behind all rows of sessions and runs,
  -- before other runs' rows of `ready`. So of two batches that meet, one waits for the other and never both.
  IF NOT (true = ALL (coalesce(made_running, '{}'))) OR begun IS NOT NULL OR capped IS NOT NULL
    OR cardinality(next_runs) > 0 THEN
    PERFORM state.lock_shares(array_agg(t.tenant_id), array_agg(t.weight), array_agg(t.change)) FROM (
      SELECT tenants[i] AS tenant_id, coalesce(weights[i], 1) AS weight, 1 AS change
      FROM unnest(made, made_running) AS m (i, is_running) WHERE NOT is_running
      UNION ALL SELECT tenants[i], 0, -1 FROM unnest(begun) AS i
      UNION ALL SELECT tenants[i], 0, 0 FROM unnest(capped) AS i
      UNION ALL SELECT t, 0, 0 FROM unnest(next_tenants) AS t
    ) AS t;
    DELETE FROM state.ready d USING unnest(coalesce(unstarted, '{}') || coalesce(capped, '{}')) AS i
    WHERE i >= end_first AND d.tenant_id = tenants[i] AND d.run_id = runs[i];
    FOR entry IN SELECT * FROM unnest(next_tenants, next_runs) AS next (tenant_id, run_id) LOOP
      became_ready := state.lead_on(entry.tenant_id, entry.run_id, false, true) = 'lined' OR became_ready;
    END LOOP;
    FOR entry IN
      SELECT f.tenant_id, array_agg(DISTINCT f.scope) AS scopes FROM (
        SELECT tenants[i] AS tenant_id, unnest(state.free_slots(tenants[i], runs[i])) AS scope FROM unnest(capped) AS i
        UNION ALL
        SELECT r.tenant_id, unnest(r.caps) FROM unnest(next_tenants, next_runs) AS next (tenant_id, run_id)
        JOIN state.runs r ON r.tenant_id = next.tenant_id AND r.run_id = next.run_id
      ) AS f GROUP BY f.tenant_id
    LOOP
      became_ready := state.give_slots(entry.tenant_id, entry.scopes) OR became_ready;
    END LOOP;
    IF standing IS NOT NULL THEN
      FOR entry IN
        SELECT r.tenant_id, array_agg(r.caps[k]) AS scopes, array_agg(r.cap_limits[k]) AS limits
        FROM unnest(standing) AS i JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
        CROSS JOIN LATERAL generate_subscripts(r.caps, 1) AS k GROUP BY r.tenant_id
      LOOP
        became_ready := state.set_caps(entry.tenant_id, entry.scopes, entry.limits) OR became_ready;
      END LOOP;
      FOR entry IN SELECT i, tenants[i] AS tenant_id, runs[i] AS run_id FROM unnest(standing) AS i LOOP
        led := state.lead_on(entry.tenant_id, entry.run_id, NOT coalesce(queue_onlys[entry.i], false), false);
        became_ready := led = 'lined' OR became_ready;
        IF led <> 'begins' THEN
          standing := array_remove(standing, entry.i);
        END IF;
      END LOOP;
      -- Those that have their slots at once begin like any other.
      WITH begins AS (
        UPDATE state.runs r SET state = 2, last_seq = 1, start_time = now() FROM unnest(standing) AS i
        WHERE r.tenant_id = tenants[i] AND r.run_id = runs[i] RETURNING i, r.ordinal
      ), leased AS (
        INSERT INTO state.leases (run_id, epoch, tenant_id, executor_id)
        SELECT runs[i], 1, tenants[i], executors[i] FROM begins
      ), counted AS (
        UPDATE state.shares s SET queued = s.queued - n.count
        FROM (SELECT tenants[i] AS tenant_id, count(*) FROM begins GROUP BY 1) AS n WHERE s.tenant_id = n.tenant_id
      )
      INSERT INTO state.events (run_id, seq, event_time, append_id, tenant_id, user_id, type, event)
      SELECT runs[i], 1, new_event_time, append_ids[i], tenants[i], users[i], types[event_firsts[i]],
        events[event_firsts[i]] || state.ordinal_field(ordinal)
      FROM begins;
      DELETE FROM state.ready d USING unnest(standing) AS i WHERE d.tenant_id = tenants[i] AND d.run_id = runs[i];
      made_running := ARRAY(
        SELECT is_running OR i = ANY (standing) FROM unnest(made, made_running) WITH ORDINALITY AS m (i, is_running, k)
        ORDER BY k);
    END IF;
  END IF;

  IF cardinality(woken_runs) > 0 THEN
    INSERT INTO state.ready (run_id, due_time, tenant_id)
    SELECT DISTINCT run_id, now(), tenant_id FROM unnest(woken_tenants, woken_runs) AS woken (tenant_id, run_id)
    ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
    became_ready := true;
  END IF;
END
$body$;

-- `append_batch` as the release before knows it: none of its runs is a sub-run, and it lets none go.
CREATE OR REPLACE FUNCTION state.append(
  tenants text[], runs uuid[], append_ids uuid[], expected_seqs bigint[], epochs bigint[],
  from_states integer[], to_states integer[], progresses boolean[],
  event_firsts integer[], event_lasts integer[], types text[], events bytea[], new_event_time timestamptz,
  create_count integer, users text[], session_ids text[], policies integer[], agents text[], versions text[],
  run_inputs bytea[], keys text[], hashes bytea[], executors text[], deadlines timestamptz[], traces text[],
  end_first integer, results bytea[], errors text[], all_stages text[], usages text[],
  consumed_items integer[], consumed_requests text[], interrupt_payload bytea,
  OUT made integer[], OUT made_running boolean[], OUT made_ordinals bigint[],
  OUT hit integer[], OUT hit_users text[], OUT hit_ordinals bigint[],
  OUT missed integer[], OUT missed_reasons text[], OUT missed_runs uuid[], OUT missed_states integer[],
  OUT missed_seqs bigint[], OUT missed_ordinals bigint[], OUT became_ready boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  SELECT b.made, b.made_running, b.made_ordinals, b.hit, b.hit_users, b.hit_ordinals, b.missed, b.missed_reasons,
    b.missed_runs, b.missed_states, b.missed_seqs, b.missed_ordinals, b.became_ready
  INTO made, made_running, made_ordinals, hit, hit_users, hit_ordinals, missed, missed_reasons,
    missed_runs, missed_states, missed_seqs, missed_ordinals, became_ready
  FROM state.append_batch(
    tenants, runs, append_ids, expected_seqs, epochs, from_states, to_states, progresses, event_firsts, event_lasts,
    types, events, new_event_time, create_count, users, session_ids, policies, agents, versions, run_inputs, keys,
    hashes, executors, deadlines, traces, end_first, results, errors, all_stages, usages, consumed_items,
    consumed_requests, interrupt_payload, create_count,
    '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
    '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',
    '{}', '{}', '{}', '{}', '{}', 2147483647, '{}', '{}', '{}') AS b;
END
$body$;

-- Leases one run to an executor under its next epoch, if it has not ended; null otherwise. takes_over: its holder died.
-- One that waits or is paused stays so until an event says otherwise. A run that executors left stalled_max times
-- without a new event is leased to the state process itself. source: where it was found, 'lease', 'ready' or 'line':
-- only from the line do runs that are QUEUED come as RUNNING.
CREATE FUNCTION state.take(
  a_tenant_id text, a_run_id uuid, executor text, a_state_id text, stalled_max integer, takes_over boolean, source text,
  OUT run state.runs, OUT handed_back boolean
)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
BEGIN
  SELECT * INTO run FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id FOR UPDATE SKIP LOCKED;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  IF source = 'ready' AND run.state IN (1, 3, 4) AND NOT state.may_go(run) THEN
    run := NULL;
    RETURN;
  END IF;
  DELETE FROM state.ready d WHERE d.tenant_id = a_tenant_id AND d.run_id = a_run_id;
  IF run.state >= 5 THEN
    DELETE FROM state.leases l WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
    run := NULL;
    RETURN;
  END IF;
  -- Of a claim that was not handed over the next one says the same.
  SELECT l.handed_back AND NOT takes_over INTO handed_back FROM state.leases l
  WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
  handed_back := coalesce(handed_back, run.state = 2 AND run.last_seq > 0);
  IF run.state = 1 AND source = 'line' THEN
    run.state := 2;
  END IF;
  IF takes_over AND run.stalled >= stalled_max THEN
    executor := a_state_id;
  END IF;
  UPDATE state.runs r SET epoch = r.epoch + 1, state = run.state,
    takeovers = r.takeovers + takes_over::integer, stalled = r.stalled + takes_over::integer
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id RETURNING * INTO run;
  INSERT INTO state.leases (run_id, epoch, claim_seq, claim_state_id, handed_back, tenant_id, executor_id)
  VALUES (a_run_id, run.epoch, run.last_seq, a_state_id, handed_back, a_tenant_id, executor)
  ON CONFLICT (tenant_id, run_id) DO UPDATE SET
    epoch = excluded.epoch, claim_seq = excluded.claim_seq, claim_state_id = excluded.claim_state_id,
    handed_back = excluded.handed_back, executor_id = excluded.executor_id, create_time = now();
END
$body$;

-- Hands runs that nobody drives to an executor, so that it holds at most `credit` claimed ones: what stands in line;
-- the runs of silent executors, of executors never heard of, and those whose claim was not handed over; what is due.
-- `connected`: since when this state process has been able to store beats, in database time.
CREATE FUNCTION state.claim_runs(
  executor text, credit integer, connected timestamptz, a_state_id text, full_lease_seconds double precision,
  stalled_max integer, page_max integer
) RETURNS TABLE (run state.runs, handed_back boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  moment timestamptz := clock_timestamp();
  full_lease interval := make_interval(secs => full_lease_seconds);
  silent text[];
  room integer;
  entry record;
  taken record;
BEGIN
  connected := greatest(connected, pg_postmaster_start_time());
  silent := ARRAY(
    SELECT e.executor_id FROM state.executors e GROUP BY e.executor_id
    HAVING max(CASE WHEN e.lease_seconds > 0 THEN greatest(e.beat_time, connected) ELSE e.beat_time END
      + make_interval(secs => e.lease_seconds)) <= moment);
  IF executor = ANY (silent) OR NOT EXISTS (SELECT FROM state.executors e WHERE e.executor_id = executor) THEN
    RETURN;
  END IF;
  room := least(page_max, credit - (
    SELECT count(*) FROM state.leases l WHERE l.claim_seq IS NOT NULL AND l.executor_id = executor));
  -- What stands in line, what was lost and what is due share the room, so that none waits for the last of the others.
  FOR taken IN
    SELECT * FROM state.claim_lined(executor, a_state_id, stalled_max, floor(room / 2.0 + random())::integer, true)
  LOOP
    run := taken.run;
    handed_back := taken.handed_back;
    room := room - 1;
    RETURN NEXT;
  END LOOP;
  FOR entry IN
    SELECT l.tenant_id, l.run_id,
      NOT EXISTS (
        SELECT FROM state.executors e WHERE e.executor_id = l.executor_id AND e.executor_id <> ALL (silent)) AS is_dead
    FROM state.leases l
    WHERE l.executor_id = ANY (silent)
      OR (greatest(l.create_time, connected) + full_lease <= moment AND (
        NOT EXISTS (SELECT FROM state.executors e WHERE e.executor_id = l.executor_id)
        OR (l.claim_seq IS NOT NULL
          AND NOT EXISTS (
            SELECT FROM state.processes p WHERE p.state_id = l.claim_state_id AND p.beat_time + interval '5 s' > moment)
          AND EXISTS (
            SELECT FROM state.runs r
            WHERE r.tenant_id = l.tenant_id AND r.run_id = l.run_id AND r.last_seq = l.claim_seq))))
    LIMIT greatest(room, 0) FOR UPDATE SKIP LOCKED
  LOOP
    SELECT * INTO taken
    FROM state.take(entry.tenant_id, entry.run_id, executor, a_state_id, stalled_max, entry.is_dead, 'lease');
    run := taken.run;
    handed_back := taken.handed_back;
    CONTINUE WHEN run.run_id IS NULL;
    room := room - 1;
    RETURN NEXT;
  END LOOP;
  FOR entry IN
    SELECT d.tenant_id, d.run_id FROM state.ready d
    WHERE d.due_time <= moment
      AND NOT EXISTS (SELECT FROM state.leases l WHERE l.tenant_id = d.tenant_id AND l.run_id = d.run_id)
    ORDER BY d.due_time LIMIT 4 * greatest(room, 0) FOR UPDATE SKIP LOCKED
  LOOP
    EXIT WHEN room <= 0;
    SELECT * INTO taken
    FROM state.take(entry.tenant_id, entry.run_id, executor, a_state_id, stalled_max, false, 'ready');
    run := taken.run;
    handed_back := taken.handed_back;
    CONTINUE WHEN run.run_id IS NULL;
    room := room - 1;
    RETURN NEXT;
  END LOOP;
  FOR taken IN SELECT * FROM state.claim_lined(executor, a_state_id, stalled_max, room, false) LOOP
    run := taken.run;
    handed_back := taken.handed_back;
    RETURN NEXT;
  END LOOP;
  DELETE FROM state.executors e
  WHERE e.beat_time + greatest(e.lease_seconds, full_lease_seconds) * interval '1 s' <= moment
    AND (NOT e.executor_id = ANY (silent)
      OR NOT EXISTS (SELECT FROM state.leases l WHERE l.executor_id = e.executor_id));
END
$body$;

-- `claim_runs` as the release before knows it.
CREATE OR REPLACE FUNCTION state.claim(
  executor text, credit integer, connected timestamptz, a_state_id text, full_lease_seconds double precision,
  stalled_max integer, page_max integer
) RETURNS SETOF state.runs
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  RETURN QUERY SELECT (c.run).*
  FROM state.claim_runs(executor, credit, connected, a_state_id, full_lease_seconds, stalled_max, page_max) AS c;
END
$body$;

-- Stores what is asked of a run, once per request id, and decides the approval that is answered. No row: the caller has
-- no such run, or may not see the approval. A run without a holder becomes claimable, if the input wakes it. `reason`
-- is empty when it is stored, now or before by the same caller; `state` is the run's.
-- answer_roles: the approvals of others that the caller may answer; is_holder: the caller may say that one has expired.
CREATE FUNCTION state.ask(
  a_tenant_id text, a_user_id text, a_run_id uuid, a_request_id text, asked_by text, a_kind text, new_payload bytea,
  kind_max integer, approval_seq bigint, new_decision integer, new_data bytea, answer_roles text[], is_holder boolean
) RETURNS TABLE (reason text, state integer, holder text, input state.inputs, approval state.approvals)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  owner_id text;
  is_paused boolean;
BEGIN
  SELECT r.state, r.user_id INTO state, owner_id FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  IF a_kind = 'approval' THEN
    SELECT * INTO approval FROM state.approvals a
    WHERE a.tenant_id = a_tenant_id AND a.run_id = a_run_id AND a.seq = approval_seq FOR UPDATE;
    IF NOT FOUND OR (owner_id <> a_user_id AND approval.role <> ALL (answer_roles)) THEN
      RETURN;
    END IF;
  ELSIF owner_id <> a_user_id THEN
    RETURN;
  END IF;
  SELECT * INTO input FROM state.inputs n
  WHERE n.tenant_id = a_tenant_id AND n.run_id = a_run_id AND n.request_id = a_request_id;
  IF FOUND THEN
    reason := CASE WHEN input.kind = a_kind AND input.requested_by = asked_by THEN '' ELSE 'reused' END;
    RETURN NEXT;
    RETURN;
  END IF;
  is_paused := coalesce(
    (SELECT n.kind = 'pause' FROM state.inputs n
     WHERE n.tenant_id = a_tenant_id AND n.run_id = a_run_id AND n.consumed_seq IS NULL
       AND n.kind IN ('pause', 'resume')
     ORDER BY n.create_time DESC LIMIT 1),
    state = 4);
  reason := CASE
    WHEN state >= 5 THEN 'ended'
    WHEN a_kind = 'approval' AND NOT is_holder AND approval.role <> ALL (answer_roles)
      AND (approval.role <> 'runner' OR owner_id <> a_user_id) THEN 'role'
    WHEN approval.decision <> 0 THEN 'resolved'
    WHEN is_holder AND coalesce(approval.expires_time, 'infinity') > clock_timestamp() + interval '1 s' THEN 'early'
    WHEN NOT is_holder AND approval.expires_time <= clock_timestamp() THEN 'expired'
    WHEN a_kind = 'pause' AND is_paused OR a_kind = 'resume' AND NOT is_paused THEN 'illegal'
    WHEN (
      SELECT count(*) FROM state.inputs n WHERE n.tenant_id = a_tenant_id AND n.run_id = a_run_id
        AND n.consumed_seq IS NULL AND n.kind = a_kind) >= kind_max THEN 'full'
    ELSE '' END;
  IF reason <> '' THEN
    RETURN NEXT;
    RETURN;
  END IF;
  INSERT INTO state.inputs (run_id, create_time, tenant_id, user_id, request_id, requested_by, kind, payload)
  VALUES (a_run_id, clock_timestamp(), a_tenant_id, owner_id, a_request_id, asked_by, a_kind, new_payload)
  RETURNING * INTO input;
  IF a_kind = 'approval' THEN
    UPDATE state.approvals a SET decision = new_decision, data = new_data, resolve_time = clock_timestamp(),
      answered_by = CASE WHEN is_holder THEN '' ELSE asked_by END
    WHERE a.tenant_id = a_tenant_id AND a.run_id = a_run_id AND a.seq = approval_seq RETURNING * INTO approval;
  END IF;
  SELECT l.executor_id INTO holder FROM state.leases l WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
  IF NOT FOUND AND state.wakes(state, a_kind) THEN
    INSERT INTO state.ready (run_id, due_time, tenant_id) VALUES (a_run_id, now(), a_tenant_id)
    ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
  END IF;
  RETURN NEXT;
END
$body$;

-- Why a run of the user does not go on: who holds it, whether that executor and others beat, from when on it is
-- claimable, and the runs before it in its session's line, the first ten and how many. No row: there is no such run.
CREATE FUNCTION state.circumstances(a_tenant_id text, a_user_id text, a_run_id uuid)
RETURNS TABLE (
  holder text, is_alive boolean, alive_count bigint, due_time timestamptz, before uuid[], before_count bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  run state.runs;
BEGIN
  SELECT * INTO run FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id AND r.user_id = a_user_id;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  SELECT l.executor_id INTO holder FROM state.leases l WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
  SELECT count(DISTINCT e.executor_id), coalesce(bool_or(e.executor_id = holder), false) INTO alive_count, is_alive
  FROM state.executors e WHERE e.beat_time + make_interval(secs => e.lease_seconds) > clock_timestamp();
  SELECT nullif(d.due_time, 'infinity') INTO due_time FROM state.ready d
  WHERE d.tenant_id = a_tenant_id AND d.run_id = a_run_id;
  IF run.state = 1 THEN
    SELECT array_agg(line.run_id ORDER BY line.ordinal) FILTER (WHERE line.place <= 10), count(*)
    INTO before, before_count
    FROM (
      SELECT ahead.run_id, ahead.ordinal, row_number() OVER (ORDER BY ahead.ordinal) AS place
      FROM (
        SELECT s.head_run_id AS run_id, 0 AS ordinal FROM state.sessions s
        WHERE s.tenant_id = run.tenant_id AND s.user_id = run.user_id AND s.session_id = run.session_id
          AND s.head_run_id <> run.run_id
        UNION ALL
        SELECT q.run_id, q.ordinal FROM state.queued q
        WHERE q.tenant_id = run.tenant_id AND q.user_id = run.user_id AND q.session_id = run.session_id
          AND q.ordinal < run.ordinal
      ) AS ahead
    ) AS line;
  END IF;
  RETURN NEXT;
END
$body$;

-- Takes ends that somebody has to be told of, with their runs; nobody else gets them for hold_seconds, in which the
-- taker settles them.
CREATE FUNCTION state.due_webhooks(item_max integer, hold_seconds double precision)
RETURNS TABLE (url text, credential text, attempts integer, run state.runs)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  entry record;
BEGIN
  FOR entry IN
    SELECT w.tenant_id, w.run_id, w.url, w.credential, w.attempts FROM state.webhooks w
    WHERE w.due_time <= now() ORDER BY w.due_time LIMIT item_max FOR UPDATE SKIP LOCKED
  LOOP
    UPDATE state.webhooks w SET due_time = now() + make_interval(secs => hold_seconds), attempts = w.attempts + 1
    WHERE w.tenant_id = entry.tenant_id AND w.run_id = entry.run_id;
    SELECT * INTO run FROM state.runs r WHERE r.tenant_id = entry.tenant_id AND r.run_id = entry.run_id;
    url := entry.url;
    credential := entry.credential;
    attempts := entry.attempts + 1;
    RETURN NEXT;
  END LOOP;
END
$body$;

-- Says what became of telling: done (the row goes), or what went wrong and when it is tried again (null: never).
CREATE FUNCTION state.settle_webhook(
  a_tenant_id text, a_run_id uuid, is_done boolean, next_due timestamptz, error text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
BEGIN
  IF is_done THEN
    DELETE FROM state.webhooks w WHERE w.tenant_id = a_tenant_id AND w.run_id = a_run_id;
  ELSE
    UPDATE state.webhooks w SET due_time = next_due, last_error = error
    WHERE w.tenant_id = a_tenant_id AND w.run_id = a_run_id;
  END IF;
END
$body$;

DO $functions$
DECLARE
  signature regprocedure;
BEGIN
  GRANT CREATE ON SCHEMA state TO mainspring_state_engine;
  ALTER VIEW state.run_metrics OWNER TO mainspring_state_engine;
  FOR signature IN
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'state'::regnamespace
      AND p.proname IN ('wakes', 'sub_run_ended', 'append_batch', 'take', 'claim_runs', 'ask', 'circumstances',
        'due_webhooks', 'settle_webhook')
  LOOP
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state_engine', signature);
    IF signature::text NOT SIMILAR TO 'state.(wakes|sub_run_ended|take)\(%' THEN
      EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state', signature);
    END IF;
    EXECUTE format('ALTER FUNCTION %s OWNER TO mainspring_state_engine', signature);
  END LOOP;
  REVOKE CREATE ON SCHEMA state FROM mainspring_state_engine;
END
$functions$;

-- migrate: rollback
-- Forward only: restore a backup instead.
