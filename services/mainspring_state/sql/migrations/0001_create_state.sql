-- Sessions, runs, their log, inputs, leases and claimables; roles and forced row-level security.
-- depends:

-- migrate: apply

-- Roles belong to the cluster: another database may have made them, even at this moment.
DO $roles$
BEGIN
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mainspring_state') THEN
    BEGIN
      CREATE ROLE mainspring_state LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOBYPASSRLS;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
    END;
  END IF;
  IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'mainspring_state_engine') THEN
    BEGIN
      CREATE ROLE mainspring_state_engine NOLOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOINHERIT NOBYPASSRLS;
    EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
    END;
  END IF;
  IF NOT pg_has_role(current_user, 'mainspring_state_engine', 'USAGE') THEN
    EXECUTE format('GRANT mainspring_state_engine TO %I', current_user);
  END IF;
END
$roles$;

CREATE SCHEMA IF NOT EXISTS state;

-- No CHECK constraints on what an append writes: PostgreSQL prepares them anew for every statement; core checks before.

-- A user's conversation. head_run_id: the run whose turn it is; waiting: how many stand in `queued` behind it.
CREATE TABLE state.sessions (
  head_run_id uuid,
  last_run_id uuid,
  run_count bigint NOT NULL DEFAULT 0,
  create_time timestamptz NOT NULL DEFAULT now(),
  update_time timestamptz NOT NULL DEFAULT now(),
  waiting integer NOT NULL DEFAULT 0,
  policy smallint NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  session_id text COLLATE "C" NOT NULL,
  title text NOT NULL DEFAULT '',
  request_id text COLLATE "C" NOT NULL DEFAULT '',
  PRIMARY KEY (tenant_id, user_id, session_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

-- The indexes for lists are partial, on what is always true but said by lists alone: however small a table was when the
-- append was planned, it can only take the primary key.
CREATE INDEX sessions_newest ON state.sessions (tenant_id, user_id, create_time, session_id)
  WHERE create_time > '-infinity';

-- A run: its start request and what has become of it. No index on a column that an append changes, and room on each page
-- for the updates of all its rows at once: updates stay HOT.
-- append_id: the create's. stalled: takeovers since the last event that was not run_recovered.
CREATE TABLE state.runs (
  run_id uuid NOT NULL,
  append_id uuid NOT NULL,
  ordinal bigint NOT NULL,
  last_seq bigint NOT NULL DEFAULT 0,
  epoch bigint NOT NULL DEFAULT 1,
  create_time timestamptz NOT NULL DEFAULT now(),
  start_time timestamptz,
  end_time timestamptz,
  released_time timestamptz,
  deadline timestamptz,
  takeovers integer NOT NULL DEFAULT 0,
  stalled integer NOT NULL DEFAULT 0,
  state smallint NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  session_id text COLLATE "C" NOT NULL,
  agent text NOT NULL,
  agent_version text NOT NULL,
  trace_id text NOT NULL DEFAULT '',
  input bytea NOT NULL,
  result bytea,
  error jsonb,
  stages jsonb,
  usage jsonb,
  PRIMARY KEY (tenant_id, run_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);

CREATE INDEX runs_of_user ON state.runs (tenant_id, user_id, run_id) WHERE ordinal > 0;
CREATE INDEX runs_of_session ON state.runs (tenant_id, user_id, session_id, run_id) WHERE ordinal > 0;

-- The log. `event` is the serialized RunEvent; the columns beside it are what is queried. Run ids are ordered by time.
CREATE TABLE state.events (
  run_id uuid NOT NULL,
  seq bigint NOT NULL,
  event_time timestamptz NOT NULL,
  append_id uuid NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  type text COLLATE "C" NOT NULL,
  event bytea NOT NULL,
  PRIMARY KEY (tenant_id, run_id, seq)
) PARTITION BY RANGE (run_id);

CREATE TABLE state.events_other PARTITION OF state.events DEFAULT;

-- What somebody asks of a run. `payload`: a serialized RunInput with nothing but what is asked.
CREATE TABLE state.inputs (
  run_id uuid NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  consumed_seq bigint,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  request_id text COLLATE "C" NOT NULL,
  requested_by text NOT NULL,
  payload bytea NOT NULL,
  PRIMARY KEY (tenant_id, run_id, request_id)
);

CREATE INDEX inputs_unconsumed ON state.inputs (tenant_id, run_id) WHERE consumed_seq IS NULL;

-- Which run an idempotency key of a user names.
CREATE TABLE state.idempotency_keys (
  run_id uuid NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  idempotency_key text COLLATE "C" NOT NULL,
  request_hash bytea NOT NULL,
  PRIMARY KEY (tenant_id, user_id, idempotency_key)
);

-- The runs that stand in a session's line.
CREATE TABLE state.queued (
  run_id uuid NOT NULL,
  ordinal bigint NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  session_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant_id, user_id, session_id, ordinal)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Runs that somebody must take up, from due_time on.
CREATE TABLE state.ready (
  run_id uuid NOT NULL,
  due_time timestamptz NOT NULL,
  priority smallint NOT NULL DEFAULT 0,
  tenant_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant_id, run_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX ready_due ON state.ready (due_time);

-- Who drives a run. One row per run under way, gone with its terminal event; small, so that it needs no second index.
-- claim_state_id, claim_seq: of a claim, the state process that was to hand it over, and the run's last seq then.
CREATE TABLE state.leases (
  run_id uuid NOT NULL,
  epoch bigint NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  claim_seq bigint,
  claim_state_id text COLLATE "C",
  tenant_id text COLLATE "C" NOT NULL,
  executor_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant_id, run_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

-- Who is alive. An executor may beat on a stream to each state process; it is silent when each of its streams has been
-- for lease_seconds.
CREATE TABLE state.executors (
  executor_id text COLLATE "C" NOT NULL,
  stream_id text COLLATE "C" NOT NULL,
  beat_time timestamptz NOT NULL DEFAULT now(),
  lease_seconds double precision NOT NULL,
  PRIMARY KEY (executor_id, stream_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- The state processes, so that each knows whether it should be hearing others.
CREATE TABLE state.processes (
  state_id text COLLATE "C" PRIMARY KEY,
  beat_time timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 200);

-- Row-level security: a user sees the user's own rows; the engine's functions see all and check for themselves.
ALTER TABLE state.sessions ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.runs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.events ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.inputs ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.idempotency_keys ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.queued ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.ready ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.leases ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.executors ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.processes ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.events_other ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY engine ON state.sessions TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.runs TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.events TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.inputs TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.idempotency_keys TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.queued TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.ready TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.leases TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.executors TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.processes TO mainspring_state_engine USING (true) WITH CHECK (true);

CREATE POLICY own ON state.sessions USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
CREATE POLICY own ON state.runs USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
CREATE POLICY own ON state.events USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
CREATE POLICY own ON state.inputs USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
CREATE POLICY own ON state.idempotency_keys USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));
CREATE POLICY own ON state.queued USING (
  tenant_id = current_setting('mainspring.tenant_id', true) AND user_id = current_setting('mainspring.user_id', true));

GRANT SELECT, INSERT, UPDATE, DELETE ON
  state.sessions, state.runs, state.events, state.inputs, state.idempotency_keys, state.queued,
  state.ready, state.leases, state.executors, state.processes
  TO mainspring_state_engine;

-- Makes the log's partitions, a week each, from this week on; returns how many were made. A week for which rows
-- already lie in the default partition stays there. Owned by the tables' owner: attaching needs that.
CREATE FUNCTION state.make_partitions(weeks_ahead integer) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '2s' AS $body$
DECLARE
  week_seconds constant bigint := 604800;
  this_week integer := floor(extract(epoch FROM clock_timestamp()) / week_seconds);
  name text;
  made integer := 0;
BEGIN
  FOR week IN this_week .. this_week + least(weeks_ahead, 52) LOOP
    name := 'events_' || to_char(to_timestamp(week * week_seconds) AT TIME ZONE 'UTC', 'YYYYMMDD');
    CONTINUE WHEN to_regclass('state.' || name) IS NOT NULL;
    BEGIN
      EXECUTE format('CREATE TABLE state.%I (LIKE state.events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
      EXECUTE format('ALTER TABLE state.%I ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY', name);
      EXECUTE format(
        'ALTER TABLE state.events ATTACH PARTITION state.%I FOR VALUES FROM (%L) TO (%L)', name,
        (rpad(lpad(to_hex(week * week_seconds * 1000), 12, '0'), 32, '0'))::uuid,
        (rpad(lpad(to_hex((week + 1) * week_seconds * 1000), 12, '0'), 32, '0'))::uuid);
      made := made + 1;
    EXCEPTION WHEN check_violation OR duplicate_table THEN NULL;
    END;
  END LOOP;
  RETURN made;
END
$body$;

SELECT state.make_partitions(4);

-- A protobuf varint, for the one field of an event that only the database knows.
CREATE FUNCTION state.varint(value bigint) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  encoded bytea := '';
BEGIN
  WHILE value > 127 LOOP
    encoded := encoded || set_byte('\x00', 0, ((value & 127) | 128)::integer);
    value := value >> 7;
  END LOOP;
  RETURN encoded || set_byte('\x00', 0, value::integer);
END
$body$;

-- RunEvent.agent_started.ordinal as bytes: behind a serialized agent_started, a parser merges it in.
CREATE FUNCTION state.ordinal_field(ordinal bigint) RETURNS bytea
LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  field bytea := '\x18' || state.varint(ordinal);
BEGIN
  RETURN '\xa201' || state.varint(length(field)) || field;
END
$body$;

-- Commits one batch of appends: no run, session or idempotency key twice. Items 1 to `create_count` are creates, those
-- from `end_first` on are terminal. Arrays are read by subscript (plpgsql holds them expanded), so that no plan joins
-- arrays and every table is reached by its key, whatever its statistics say.
CREATE FUNCTION state.append(
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
LANGUAGE plpgsql SECURITY DEFINER
SET search_path = pg_catalog, pg_temp
SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET plan_cache_mode = force_generic_plan
AS $body$
DECLARE
  item_count integer := cardinality(runs);
  fresh integer[];
  moved integer[];
  unstarted integer[];
  entry record;
  next_run uuid;
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

    WITH line AS (
      INSERT INTO state.sessions AS s (tenant_id, user_id, session_id, policy, run_count, head_run_id, last_run_id)
      SELECT tenants[i], users[i], session_ids[i], policies[i], 1, CASE WHEN policies[i] <> 4 THEN runs[i] END, runs[i]
      FROM generate_series(1, create_count) AS i
      WHERE i <> ALL (missed)
      ON CONFLICT (tenant_id, user_id, session_id) DO UPDATE SET
        run_count = s.run_count + 1,
        update_time = now(),
        last_run_id = excluded.last_run_id,
        head_run_id = CASE WHEN s.policy <> 4 THEN coalesce(s.head_run_id, excluded.last_run_id) END,
        waiting = s.waiting + CASE WHEN s.policy <> 4 AND s.head_run_id IS NOT NULL THEN 1 ELSE 0 END
      WHERE s.policy <> 2 OR s.head_run_id IS NULL
      RETURNING array_position(runs, s.last_run_id) AS i, s.run_count AS ordinal,
        s.policy = 4 OR s.head_run_id = s.last_run_id AS is_running
    ), made_runs AS (
      INSERT INTO state.runs (run_id, append_id, ordinal, last_seq, start_time, deadline, state, tenant_id, user_id,
        session_id, agent, agent_version, trace_id, input)
      SELECT runs[i], append_ids[i], ordinal, is_running::integer, CASE WHEN is_running THEN now() END, deadlines[i],
        1 + is_running::integer, tenants[i], users[i], session_ids[i], agents[i], versions[i], traces[i], run_inputs[i]
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
      SELECT runs[i], ordinal, tenants[i], users[i], session_ids[i] FROM line WHERE NOT is_running
    ), due AS (
      INSERT INTO state.ready (run_id, due_time, tenant_id)
      SELECT runs[i], deadlines[i], tenants[i] FROM line WHERE NOT is_running AND deadlines[i] IS NOT NULL
    ), keyed AS (
      INSERT INTO state.idempotency_keys (run_id, tenant_id, user_id, idempotency_key, request_hash)
      SELECT runs[i], tenants[i], users[i], keys[i], hashes[i] FROM line WHERE keys[i] <> ''
    )
    SELECT array_agg(i), array_agg(is_running), array_agg(ordinal) INTO made, made_running, made_ordinals FROM line;

    -- Refused by the session's policy.
    IF coalesce(cardinality(made), 0) + cardinality(missed) < create_count THEN
      FOR entry IN SELECT i FROM generate_series(1, create_count) AS i
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
        FROM generate_series(1, create_count) AS i
        JOIN state.sessions s ON s.tenant_id = tenants[i] AND s.user_id = users[i] AND s.session_id = session_ids[i]
        WHERE s.policy = 3 AND i = ANY (made) AND s.head_run_id <> runs[i]
      ), asked AS (
        INSERT INTO state.inputs (run_id, tenant_id, user_id, request_id, requested_by, payload)
        SELECT head_run_id, tenant_id, user_id, by_run::text, user_id, interrupt_payload FROM head
        ON CONFLICT DO NOTHING
      )
      INSERT INTO state.ready (run_id, due_time, tenant_id)
      SELECT head_run_id, now(), tenant_id FROM head
      ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
      became_ready := became_ready OR FOUND;
    END IF;
  END IF;

  IF item_count > create_count THEN
    WITH changed AS (
      UPDATE state.runs r SET
        last_seq = expected_seqs[i] + event_lasts[i] - event_firsts[i] + 1,
        state = to_states[i],
        stalled = CASE WHEN progresses[i] THEN 0 ELSE r.stalled END,
        start_time = CASE WHEN expected_seqs[i] = 0 AND i < end_first THEN now() ELSE r.start_time END,
        end_time = CASE WHEN i >= end_first THEN now() END,
        released_time = CASE WHEN i >= end_first THEN now() END,
        result = results[i - end_first + 1],
        error = errors[i - end_first + 1]::jsonb,
        stages = all_stages[i - end_first + 1]::jsonb,
        usage = usages[i - end_first + 1]::jsonb
      FROM generate_series(create_count + 1, item_count) AS i
      WHERE r.tenant_id = tenants[i] AND r.run_id = runs[i]
        AND r.last_seq = expected_seqs[i] AND r.epoch = epochs[i] AND (from_states[i] >> r.state) & 1 = 1
      RETURNING i, r.user_id, r.session_id, r.ordinal, r.start_time
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
    SELECT array_agg(i), array_agg(user_id), array_agg(ordinal),
      array_agg(i) FILTER (WHERE i >= end_first AND start_time IS NULL),
      (SELECT array_agg(freed.i) FILTER (WHERE freed.waiting > 0) FROM freed)
    INTO hit, hit_users, hit_ordinals, unstarted, moved FROM changed;

    IF cardinality(consumed_items) > 0 THEN
      UPDATE state.inputs n SET consumed_seq = expected_seqs[i] + event_lasts[i] - event_firsts[i] + 1
      FROM (
        SELECT consumed_items[k] AS i, consumed_requests[k] AS request FROM generate_subscripts(consumed_items, 1) AS k
      ) AS consumed
      WHERE consumed.i = ANY (hit) AND n.tenant_id = tenants[i] AND n.run_id = runs[i] AND n.request_id = request
        AND n.consumed_seq IS NULL;
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
      DELETE FROM state.ready d USING unnest(unstarted) AS i WHERE d.tenant_id = tenants[i] AND d.run_id = runs[i];
      WITH freed AS (
        UPDATE state.sessions s SET head_run_id = NULL FROM unnest(unstarted) AS i
        JOIN state.runs r ON r.tenant_id = tenants[i] AND r.run_id = runs[i]
        WHERE s.tenant_id = r.tenant_id AND s.user_id = r.user_id AND s.session_id = r.session_id
          AND s.head_run_id = r.run_id
        RETURNING i, s.waiting
      )
      SELECT moved || array_agg(i) FILTER (WHERE waiting > 0) INTO moved FROM freed;
    END IF;

    -- The line moves: the next run of the session is claimable.
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
        INSERT INTO state.ready (run_id, due_time, tenant_id) VALUES (next_run, now(), entry.tenant_id)
        ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
        became_ready := true;
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
END
$body$;

-- Stores an executor's beat on one of its streams.
CREATE FUNCTION state.beat(an_executor_id text, a_stream_id text, new_lease_seconds double precision) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  INSERT INTO state.executors (executor_id, stream_id, beat_time, lease_seconds)
  VALUES (an_executor_id, a_stream_id, clock_timestamp(), new_lease_seconds)
  ON CONFLICT (executor_id, stream_id) DO UPDATE SET
    beat_time = excluded.beat_time, lease_seconds = excluded.lease_seconds
$body$;

-- Less patience with an executor: its stream broke, or (no stream given) it leaves.
CREATE FUNCTION state.shorten_lease(an_executor_id text, a_stream_id text, new_lease_seconds double precision)
RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  UPDATE state.executors SET lease_seconds = least(lease_seconds, new_lease_seconds)
  WHERE executor_id = an_executor_id AND (a_stream_id = '' OR stream_id = a_stream_id)
$body$;

-- Claims that a state process may not have handed over: another look finds them, unless their runs went on.
CREATE FUNCTION state.disown(a_state_id text, an_executor_id text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  UPDATE state.leases l SET claim_state_id = ''
  WHERE l.claim_state_id = a_state_id AND l.executor_id = an_executor_id
$body$;

-- Leases one run to an executor under its next epoch, if it has not ended; null otherwise. takes_over: its holder died.
-- A run that executors left stalled_max times without a new event is leased to the state process itself.
CREATE FUNCTION state.take_run(
  a_tenant_id text, a_run_id uuid, executor text, a_state_id text, stalled_max integer, takes_over boolean
) RETURNS state.runs
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  run state.runs;
  has_turn boolean;
BEGIN
  SELECT * INTO run FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id FOR UPDATE SKIP LOCKED;
  IF NOT FOUND THEN
    RETURN NULL;
  END IF;
  DELETE FROM state.ready d WHERE d.tenant_id = a_tenant_id AND d.run_id = a_run_id;
  IF run.state >= 5 THEN
    DELETE FROM state.leases l WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
    RETURN NULL;
  END IF;
  IF run.state = 1 THEN
    SELECT s.policy = 4 OR s.head_run_id = a_run_id INTO has_turn FROM state.sessions s
    WHERE s.tenant_id = run.tenant_id AND s.user_id = run.user_id AND s.session_id = run.session_id;
    IF has_turn THEN
      run.state := 2;
    END IF;
  END IF;
  IF takes_over AND run.stalled >= stalled_max THEN
    executor := a_state_id;
  END IF;
  UPDATE state.runs r SET epoch = r.epoch + 1, state = run.state,
    takeovers = r.takeovers + takes_over::integer, stalled = r.stalled + takes_over::integer
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id RETURNING * INTO run;
  INSERT INTO state.leases (run_id, epoch, claim_seq, claim_state_id, tenant_id, executor_id)
  VALUES (a_run_id, run.epoch, run.last_seq, a_state_id, a_tenant_id, executor)
  ON CONFLICT (tenant_id, run_id) DO UPDATE SET
    epoch = excluded.epoch, claim_seq = excluded.claim_seq, claim_state_id = excluded.claim_state_id,
    executor_id = excluded.executor_id, create_time = now();
  RETURN run;
END
$body$;

-- Hands runs that nobody drives to an executor, so that it holds at most `credit` claimed ones: first the runs of
-- silent executors, of executors never heard of, and those whose claim was not handed over; then what is due.
-- `connected`: since when this state process has been able to store beats, in database time.
CREATE FUNCTION state.claim(
  executor text, credit integer, connected timestamptz, a_state_id text, full_lease_seconds double precision,
  stalled_max integer, page_max integer
) RETURNS SETOF state.runs
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  moment timestamptz := clock_timestamp();
  full_lease interval := make_interval(secs => full_lease_seconds);
  silent text[];
  room integer;
  entry record;
  run state.runs;
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
    run := state.take_run(entry.tenant_id, entry.run_id, executor, a_state_id, stalled_max, entry.is_dead);
    CONTINUE WHEN run.run_id IS NULL;
    room := room - 1;
    RETURN NEXT run;
  END LOOP;
  FOR entry IN
    SELECT d.tenant_id, d.run_id FROM state.ready d
    WHERE d.due_time <= moment
      AND NOT EXISTS (SELECT FROM state.leases l WHERE l.tenant_id = d.tenant_id AND l.run_id = d.run_id)
    ORDER BY d.due_time LIMIT greatest(room, 0) FOR UPDATE SKIP LOCKED
  LOOP
    run := state.take_run(entry.tenant_id, entry.run_id, executor, a_state_id, stalled_max, false);
    CONTINUE WHEN run.run_id IS NULL;
    RETURN NEXT run;
  END LOOP;
  DELETE FROM state.executors e
  WHERE e.beat_time + greatest(e.lease_seconds, full_lease_seconds) * interval '1 s' <= moment
    AND (NOT e.executor_id = ANY (silent)
      OR NOT EXISTS (SELECT FROM state.leases l WHERE l.executor_id = e.executor_id));
END
$body$;

-- Forgets claimables of runs that ended.
CREATE FUNCTION state.tidy_ready() RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  DELETE FROM state.ready d
  WHERE d.due_time <= now() - interval '1 second'
    AND NOT EXISTS (
      SELECT FROM state.runs r WHERE r.tenant_id = d.tenant_id AND r.run_id = d.run_id AND r.state < 5)
$body$;

-- The unconsumed inputs of some runs, oldest first.
CREATE FUNCTION state.inputs_of(tenants text[], run_ids uuid[]) RETURNS SETOF state.inputs
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  SELECT n.* FROM unnest(tenants, run_ids) AS wanted (tenant_id, run_id)
  JOIN state.inputs n ON n.tenant_id = wanted.tenant_id AND n.run_id = wanted.run_id
  WHERE n.consumed_seq IS NULL ORDER BY n.create_time
$body$;

-- The unconsumed inputs of the runs that some executors hold, with the holder.
CREATE FUNCTION state.inputs_for(executor_ids text[], item_max integer)
RETURNS TABLE (executor_id text, input state.inputs)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  SELECT l.executor_id, n FROM state.inputs n
  JOIN state.leases l ON l.tenant_id = n.tenant_id AND l.run_id = n.run_id
  WHERE n.consumed_seq IS NULL AND l.executor_id = ANY (executor_ids) ORDER BY n.create_time LIMIT item_max
$body$;

-- Stores an input once per request id. No row: the user has no such run. A run without a holder becomes claimable.
CREATE FUNCTION state.put_input(
  a_tenant_id text, a_user_id text, a_run_id uuid, a_request_id text, asked_by text, new_payload bytea
) RETURNS TABLE (state integer, holder text, input state.inputs)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  run_state integer;
  run_holder text;
  stored state.inputs;
BEGIN
  SELECT r.state INTO run_state FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id AND r.user_id = a_user_id FOR NO KEY UPDATE;
  IF NOT FOUND THEN
    RETURN;
  END IF;
  SELECT * INTO stored FROM state.inputs n
  WHERE n.tenant_id = a_tenant_id AND n.run_id = a_run_id AND n.request_id = a_request_id;
  IF NOT FOUND AND run_state < 5 THEN
    INSERT INTO state.inputs (run_id, tenant_id, user_id, request_id, requested_by, payload)
    VALUES (a_run_id, a_tenant_id, a_user_id, a_request_id, asked_by, new_payload) RETURNING * INTO stored;
    SELECT l.executor_id INTO run_holder FROM state.leases l
    WHERE l.tenant_id = a_tenant_id AND l.run_id = a_run_id;
    IF NOT FOUND THEN
      INSERT INTO state.ready (run_id, due_time, tenant_id) VALUES (a_run_id, now(), a_tenant_id)
      ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
    END IF;
  END IF;
  RETURN QUERY SELECT run_state, run_holder, stored;
END
$body$;

-- The last seqs of runs that are followed here, to find what was missed.
CREATE FUNCTION state.last_seqs(tenants text[], run_ids uuid[]) RETURNS TABLE (run_id uuid, last_seq bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  SELECT r.run_id, r.last_seq FROM unnest(tenants, run_ids) AS wanted (tenant_id, run_id)
  JOIN state.runs r ON r.tenant_id = wanted.tenant_id AND r.run_id = wanted.run_id
$body$;

-- A page of a run's log, for watchers that were checked when they subscribed.
CREATE FUNCTION state.read_log(a_tenant_id text, a_run_id uuid, after_seq bigint, item_max integer, byte_max bigint)
RETURNS TABLE (seq bigint, event bytea)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  SELECT page.seq, page.event FROM (
    SELECT e.seq, e.event, sum(octet_length(e.event)) OVER (ORDER BY e.seq) - octet_length(e.event) AS bytes_before
    FROM state.events e
    WHERE e.tenant_id = a_tenant_id AND e.run_id = a_run_id AND e.seq > after_seq ORDER BY e.seq LIMIT item_max
  ) AS page WHERE page.bytes_before < byte_max ORDER BY page.seq
$body$;

-- Says that a state process lives; gives the others that do, and the database's clock.
CREATE FUNCTION state.meet_processes(a_state_id text) RETURNS TABLE (state_ids text[], moment timestamptz)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
BEGIN
  INSERT INTO state.processes (state_id, beat_time) VALUES (a_state_id, clock_timestamp())
  ON CONFLICT (state_id) DO UPDATE SET beat_time = excluded.beat_time;
  DELETE FROM state.processes p WHERE p.beat_time < clock_timestamp() - interval '1 hour';
  RETURN QUERY SELECT ARRAY(
    SELECT p.state_id FROM state.processes p
    WHERE p.state_id <> a_state_id AND p.beat_time > clock_timestamp() - interval '5 seconds'), clock_timestamp();
END
$body$;

-- Says that a state process has left.
CREATE FUNCTION state.leave_processes(a_state_id text) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
  DELETE FROM state.processes WHERE state_id = a_state_id
$body$;

-- The functions that cross tenants belong to a role that nobody can log in as; the service may only call them.
GRANT USAGE ON SCHEMA state TO mainspring_state, mainspring_state_engine;
GRANT SELECT ON state.sessions, state.runs, state.events TO mainspring_state;
GRANT INSERT ON state.sessions TO mainspring_state;

DO $functions$
DECLARE
  signature regprocedure;
BEGIN
  GRANT CREATE ON SCHEMA state TO mainspring_state_engine;
  FOR signature IN SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'state'::regnamespace LOOP
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state_engine', signature);
    IF signature::text NOT SIMILAR TO 'state.(make_partitions|varint|ordinal_field|take_run)\(%' THEN
      EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state', signature);
    END IF;
    IF signature::text NOT LIKE 'state.make_partitions(%' THEN
      EXECUTE format('ALTER FUNCTION %s OWNER TO mainspring_state_engine', signature);
    END IF;
  END LOOP;
  REVOKE CREATE ON SCHEMA state FROM mainspring_state_engine;
  GRANT EXECUTE ON FUNCTION state.make_partitions(integer) TO mainspring_state;
END
$functions$;

-- migrate: rollback
-- Forward only: restore a backup instead.
