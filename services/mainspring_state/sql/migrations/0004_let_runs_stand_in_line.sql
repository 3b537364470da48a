-- Concurrency caps that hold over all replicas, fair lines for executors, delayed starts and bounded backlogs.
-- depends: 0003_let_runs_wait

-- migrate: apply

-- caps, cap_limits: the scopes that the run counts in and their limits, as its create said; never changed.
-- due_time: it shall not begin before.
ALTER TABLE state.runs
  ADD COLUMN due_time timestamptz,
  ADD COLUMN caps text[],
  ADD COLUMN cap_limits integer[];

-- in_line: a run that has all it needs and stands in its tenant's line for an executor, by priority and age; due_time
-- is then when somebody must take it up in any case, to end it.
ALTER TABLE state.ready ADD COLUMN in_line boolean NOT NULL DEFAULT false;

CREATE INDEX ready_line ON state.ready (tenant_id, priority DESC, run_id) WHERE in_line;

-- A tenant's place among all tenants whose runs stand in line for executors: start-time fair queueing (Goyal, Vin,
-- Cheng 1996) by `pass`, the virtual time at which its next run is due; each costs 1 / weight. is_lined: there is one,
-- or there was. queued: its runs that were made QUEUED and have not begun.
-- The row is also the lock under which the tenant's lines, caps and slots change. It is taken behind rows of sessions
-- and runs and before other runs' rows of `ready`; claims never wait for it.
CREATE TABLE state.shares (
  pass double precision NOT NULL DEFAULT 0,
  queued bigint NOT NULL DEFAULT 0,
  weight integer NOT NULL DEFAULT 1,
  is_lined boolean NOT NULL DEFAULT false,
  tenant_id text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant_id)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX shares_turn ON state.shares (is_lined, pass);

-- Scopes in which runs hold slots now. cap: as the newest create said.
CREATE TABLE state.caps (
  cap integer NOT NULL,
  used integer NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  scope text COLLATE "C" NOT NULL,
  PRIMARY KEY (tenant_id, scope)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Who holds a slot in each of its scopes: all of them, or the run has no row.
CREATE TABLE state.slots (
  run_id uuid NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  tenant_id text COLLATE "C" NOT NULL,
  scopes text[] NOT NULL,
  PRIMARY KEY (tenant_id, run_id)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- Who waits for slots, in lanes of runs with the same scopes. Only the first of a lane has full_scope: it watches one
-- scope that is full, so that whoever frees a slot finds it, and nobody looks at all who wait behind it.
CREATE TABLE state.cap_line (
  run_id uuid NOT NULL,
  lane uuid NOT NULL,
  priority smallint NOT NULL,
  tenant_id text COLLATE "C" NOT NULL,
  full_scope text COLLATE "C",
  scopes text[] NOT NULL,
  PRIMARY KEY (tenant_id, run_id)
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

CREATE INDEX cap_line_lane ON state.cap_line (tenant_id, lane, priority DESC, run_id);
CREATE INDEX cap_line_first ON state.cap_line (tenant_id, full_scope, priority DESC, run_id)
  WHERE full_scope IS NOT NULL;

ALTER TABLE state.shares ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.caps ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.slots ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
ALTER TABLE state.cap_line ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;

CREATE POLICY engine ON state.shares TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.caps TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.slots TO mainspring_state_engine USING (true) WITH CHECK (true);
CREATE POLICY engine ON state.cap_line TO mainspring_state_engine USING (true) WITH CHECK (true);

GRANT SELECT, INSERT, UPDATE, DELETE ON state.shares, state.caps, state.slots, state.cap_line
  TO mainspring_state_engine;

-- Locks the shares of tenants, in one order, and counts what is QUEUED more or less. A weight of 0: as it is.
CREATE FUNCTION state.lock_shares(the_tenants text[], weights integer[], changes integer[]) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  INSERT INTO state.shares AS s (tenant_id, weight, queued)
  SELECT t.tenant_id, max(t.weight), sum(t.change)
  FROM unnest(the_tenants, weights, changes) AS t (tenant_id, weight, change)
  GROUP BY t.tenant_id ORDER BY t.tenant_id
  ON CONFLICT (tenant_id) DO UPDATE SET queued = greatest(s.queued + excluded.queued, 0),
    weight = CASE WHEN excluded.weight > 0 THEN excluded.weight ELSE s.weight END
$body$;

-- Which of a batch's creates would be one QUEUED run too many of their tenants. Others that are being committed at this
-- moment are not seen: so a tenant may have more than it may by what each other state process commits in one batch.
CREATE FUNCTION state.overflowing(
  the_tenants text[], users text[], session_ids text[], queue_onlys boolean[], dues timestamptz[],
  cap_items integer[], cap_scopes text[], cap_limits integer[], backlogs integer[], skipped integer[]
) RETURNS integer[]
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  refused integer[] := '{}';
  -- What the creates before in the batch bring: runs in line by tenant, slots taken by tenant and scope.
  counts jsonb := '{}';
  spot text;
  waits boolean;
BEGIN
  FOR i IN 1 .. cardinality(the_tenants) LOOP
    CONTINUE WHEN i = ANY (skipped);
    waits := coalesce(queue_onlys[i], false) OR dues[i] IS NOT NULL OR EXISTS (
      SELECT FROM state.sessions s WHERE s.tenant_id = the_tenants[i] AND s.user_id = users[i]
        AND s.session_id = session_ids[i] AND s.policy <> 4 AND s.head_run_id IS NOT NULL
    ) OR EXISTS (
      SELECT FROM generate_subscripts(cap_items, 1) AS k
      LEFT JOIN state.caps c ON c.tenant_id = the_tenants[i] AND c.scope = cap_scopes[k]
      WHERE cap_items[k] = i AND coalesce(c.used, 0)
        + coalesce((counts ->> (the_tenants[i] || ' ' || cap_scopes[k]))::integer, 0) >= cap_limits[k]);
    IF NOT waits THEN
      FOR k IN 1 .. coalesce(array_length(cap_items, 1), 0) LOOP
        CONTINUE WHEN cap_items[k] <> i;
        spot := the_tenants[i] || ' ' || cap_scopes[k];
        counts := counts || jsonb_build_object(spot, coalesce((counts ->> spot)::integer, 0) + 1);
      END LOOP;
    ELSIF coalesce((SELECT s.queued FROM state.shares s WHERE s.tenant_id = the_tenants[i]), 0)
      + coalesce((counts ->> the_tenants[i])::integer, 0) >= backlogs[i] THEN
      refused := refused || i;
    ELSE
      counts := counts || jsonb_build_object(
        the_tenants[i], coalesce((counts ->> the_tenants[i])::integer, 0) + 1);
    END IF;
  END LOOP;
  RETURN refused;
END
$body$;

-- Puts a run into its tenant's line for an executor. The tenant's share is locked. A tenant whose line was empty comes
-- in at the virtual time of now: neither its former turns nor its former idleness count.
CREATE FUNCTION state.enter_line(a_tenant_id text, a_run_id uuid, a_priority integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
BEGIN
  INSERT INTO state.ready (run_id, due_time, priority, in_line, tenant_id)
  VALUES (a_run_id, 'infinity', a_priority, true, a_tenant_id)
  ON CONFLICT (tenant_id, run_id) DO UPDATE SET in_line = true, priority = excluded.priority;
  UPDATE state.shares s SET is_lined = true, pass = greatest(s.pass, coalesce(
    (SELECT o.pass FROM state.shares o WHERE o.is_lined ORDER BY o.pass LIMIT 1),
    (SELECT o.pass FROM state.shares o WHERE NOT o.is_lined ORDER BY o.pass DESC LIMIT 1)))
  WHERE s.tenant_id = a_tenant_id AND NOT s.is_lined;
END
$body$;

-- Takes a slot in each of the scopes, or none: then it names one that is full. The tenant's share is locked.
CREATE FUNCTION state.take_slots(a_tenant_id text, a_run_id uuid, the_scopes text[], limits integer[]) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  full_scope text;
BEGIN
  SELECT c.scope INTO full_scope FROM unnest(the_scopes) WITH ORDINALITY AS wanted (scope, place)
  JOIN state.caps c ON c.tenant_id = a_tenant_id AND c.scope = wanted.scope
  WHERE c.used >= c.cap ORDER BY wanted.place LIMIT 1;
  IF FOUND THEN
    RETURN full_scope;
  END IF;
  INSERT INTO state.caps AS c (tenant_id, scope, cap, used)
  SELECT a_tenant_id, wanted.scope, wanted.cap, 1 FROM unnest(the_scopes, limits) AS wanted (scope, cap)
  ON CONFLICT (tenant_id, scope) DO UPDATE SET used = c.used + 1;
  INSERT INTO state.slots (run_id, tenant_id, scopes) VALUES (a_run_id, a_tenant_id, the_scopes);
  RETURN NULL;
END
$body$;

-- Lets a run wait for slots, one of whose scopes is full. The tenant's share is locked.
CREATE FUNCTION state.wait_for_slots(
  a_tenant_id text, a_run_id uuid, a_priority integer, the_scopes text[], a_full_scope text
) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  the_lane uuid := md5(array_to_string(the_scopes, E'\n'))::uuid;
  first record;
BEGIN
  SELECT w.run_id, w.priority, w.full_scope INTO first FROM state.cap_line w
  WHERE w.tenant_id = a_tenant_id AND w.lane = the_lane ORDER BY w.priority DESC, w.run_id LIMIT 1;
  IF FOUND THEN
    a_full_scope := NULL;
    IF (-a_priority, a_run_id) < (-first.priority::integer, first.run_id) THEN
      UPDATE state.cap_line w SET full_scope = NULL WHERE w.tenant_id = a_tenant_id AND w.run_id = first.run_id;
      a_full_scope := first.full_scope;
    END IF;
  END IF;
  INSERT INTO state.cap_line (run_id, lane, priority, tenant_id, full_scope, scopes)
  VALUES (a_run_id, the_lane, a_priority, a_tenant_id, a_full_scope, the_scopes);
END
$body$;

-- Takes a run out of the line for slots; the next of its lane watches in its place. The tenant's share is locked.
CREATE FUNCTION state.stop_waiting(a_tenant_id text, a_run_id uuid) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  gone record;
BEGIN
  DELETE FROM state.cap_line w WHERE w.tenant_id = a_tenant_id AND w.run_id = a_run_id
  RETURNING w.lane, w.full_scope INTO gone;
  IF gone.full_scope IS NOT NULL THEN
    UPDATE state.cap_line w SET full_scope = gone.full_scope
    WHERE w.tenant_id = a_tenant_id AND w.run_id = (
      SELECT next.run_id FROM state.cap_line next
      WHERE next.tenant_id = a_tenant_id AND next.lane = gone.lane ORDER BY next.priority DESC, next.run_id LIMIT 1);
  END IF;
END
$body$;

-- Gives out what is free in some scopes: to the first of all who watch one of them, by priority and age, until each is
-- full or nobody watches it. Whoever lacks a slot elsewhere watches there from now on. The tenant's share is locked.
CREATE FUNCTION state.give_slots(a_tenant_id text, the_scopes text[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  first record;
  other_scope text;
  gave boolean := false;
BEGIN
  LOOP
    SELECT w.* INTO first FROM unnest(the_scopes) AS freed (scope)
    CROSS JOIN LATERAL (
      SELECT l.run_id, l.priority, l.scopes FROM state.cap_line l
      WHERE l.tenant_id = a_tenant_id AND l.full_scope = freed.scope ORDER BY l.priority DESC, l.run_id LIMIT 1) AS w
    WHERE NOT EXISTS (
      SELECT FROM state.caps c WHERE c.tenant_id = a_tenant_id AND c.scope = freed.scope AND c.used >= c.cap)
    ORDER BY w.priority DESC, w.run_id LIMIT 1;
    EXIT WHEN NOT FOUND;
    SELECT state.take_slots(a_tenant_id, first.run_id, first.scopes, r.cap_limits) INTO other_scope
    FROM state.runs r WHERE r.tenant_id = a_tenant_id AND r.run_id = first.run_id;
    IF other_scope IS NOT NULL THEN
      UPDATE state.cap_line w SET full_scope = other_scope
      WHERE w.tenant_id = a_tenant_id AND w.run_id = first.run_id;
    ELSE
      PERFORM state.stop_waiting(a_tenant_id, first.run_id);
      PERFORM state.enter_line(a_tenant_id, first.run_id, first.priority);
      gave := true;
    END IF;
  END LOOP;
  RETURN gave;
END
$body$;

-- Sets the limits of scopes in which a run is made. The tenant's share is locked.
CREATE FUNCTION state.set_caps(a_tenant_id text, the_scopes text[], limits integer[]) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  raised text[];
BEGIN
  WITH changed AS (
    UPDATE state.caps c SET cap = wanted.cap FROM unnest(the_scopes, limits) AS wanted (scope, cap)
    WHERE c.tenant_id = a_tenant_id AND c.scope = wanted.scope AND c.cap <> wanted.cap RETURNING c.scope
  )
  SELECT array_agg(scope) INTO raised FROM changed;
  RETURN raised IS NOT NULL AND state.give_slots(a_tenant_id, raised);
END
$body$;

-- A run ended or waits: it leaves the line for slots, or gives its slots back; in which scopes. The tenant's share is
-- locked.
CREATE FUNCTION state.free_slots(a_tenant_id text, a_run_id uuid) RETURNS text[]
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  freed text[];
BEGIN
  DELETE FROM state.slots h WHERE h.tenant_id = a_tenant_id AND h.run_id = a_run_id RETURNING h.scopes INTO freed;
  IF freed IS NULL THEN
    PERFORM state.stop_waiting(a_tenant_id, a_run_id);
    RETURN '{}';
  END IF;
  DELETE FROM state.caps c WHERE c.tenant_id = a_tenant_id AND c.scope = ANY (freed) AND c.used <= 1;
  UPDATE state.caps c SET used = c.used - 1 WHERE c.tenant_id = a_tenant_id AND c.scope = ANY (freed);
  RETURN freed;
END
$body$;

-- Leads on a run whose turn in its session has come: to its time, then to its slots, then to an executor. 'begins': it
-- has all it needs and its creator may begin it; 'lined': it stands in line for an executor; 'waits'. Where others may
-- have a better right to free slots, it waits_first, until `give_slots` is called. The tenant's share is locked.
CREATE FUNCTION state.lead_on(a_tenant_id text, a_run_id uuid, may_begin boolean, waits_first boolean) RETURNS text
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  run record;
  full_scope text;
BEGIN
  SELECT r.priority, r.due_time, r.caps, r.cap_limits INTO run FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id;
  IF run.due_time > clock_timestamp() THEN
    INSERT INTO state.ready (run_id, due_time, tenant_id) VALUES (a_run_id, run.due_time, a_tenant_id)
    ON CONFLICT (tenant_id, run_id) DO UPDATE SET due_time = least(state.ready.due_time, excluded.due_time);
    RETURN 'waits';
  END IF;
  IF run.caps IS NOT NULL THEN
    full_scope := CASE WHEN waits_first THEN run.caps[1]
      ELSE state.take_slots(a_tenant_id, a_run_id, run.caps, run.cap_limits) END;
    IF full_scope IS NOT NULL THEN
      PERFORM state.wait_for_slots(a_tenant_id, a_run_id, run.priority, run.caps, full_scope);
      RETURN 'waits';
    END IF;
  END IF;
  IF may_begin THEN
    RETURN 'begins';
  END IF;
  PERFORM state.enter_line(a_tenant_id, a_run_id, run.priority);
  RETURN 'lined';
END
$body$;

-- Whether a run that is locked and that nobody drives may be handed out outside its tenant's line: one that is to go on
-- and holds its slots, if it has caps, and one that is only to be ended. Any other is led on to its line; if the
-- tenant's share is locked by somebody, at another look.
CREATE FUNCTION state.may_go(run state.runs) RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  again timestamptz := coalesce(run.deadline, 'infinity');
  full_scope text;
BEGIN
  IF run.state = 2 OR (run.state <> 1 AND run.caps IS NULL) OR run.deadline <= clock_timestamp() OR EXISTS (
    SELECT FROM state.inputs n WHERE n.tenant_id = run.tenant_id AND n.run_id = run.run_id
      AND n.consumed_seq IS NULL AND n.kind = 'cancel') THEN
    RETURN true;
  END IF;
  IF run.state = 1 AND run.due_time > clock_timestamp() THEN
    again := run.due_time;
  ELSIF EXISTS (SELECT FROM state.slots h WHERE h.tenant_id = run.tenant_id AND h.run_id = run.run_id) THEN
    -- One that is QUEUED stands in its tenant's line.
    IF run.state <> 1 THEN
      RETURN true;
    END IF;
  ELSIF NOT EXISTS (SELECT FROM state.cap_line w WHERE w.tenant_id = run.tenant_id AND w.run_id = run.run_id)
    AND NOT EXISTS (
      SELECT FROM state.ready d WHERE d.tenant_id = run.tenant_id AND d.run_id = run.run_id AND d.in_line)
    AND (run.state <> 1 OR EXISTS (
      SELECT FROM state.sessions s WHERE s.tenant_id = run.tenant_id AND s.user_id = run.user_id
        AND s.session_id = run.session_id AND (s.policy = 4 OR s.head_run_id = run.run_id))) THEN
    PERFORM FROM state.shares s WHERE s.tenant_id = run.tenant_id FOR NO KEY UPDATE SKIP LOCKED;
    IF NOT FOUND THEN
      RETURN false;
    END IF;
    IF run.state = 1 THEN
      PERFORM state.lead_on(run.tenant_id, run.run_id, false, false);
    ELSE
      full_scope := state.take_slots(run.tenant_id, run.run_id, run.caps, run.cap_limits);
      IF full_scope IS NULL THEN
        RETURN true;
      END IF;
      PERFORM state.wait_for_slots(run.tenant_id, run.run_id, run.priority, run.caps, full_scope);
    END IF;
  END IF;
  UPDATE state.ready d SET due_time = again WHERE d.tenant_id = run.tenant_id AND d.run_id = run.run_id;
  RETURN false;
END
$body$;

-- The next tenant's runs in line for an executor: at most room_max, and none that another tenant has a better right
-- to. No row: there is nothing to be had, or others have it locked; may_wait: then it waits for the first of it, which
-- only who holds no lock may do. The share stays locked; `settle_line` must be told how many were taken.
CREATE FUNCTION state.next_in_line(passed_tenants text[], room_max integer, may_wait boolean)
RETURNS TABLE (tenant_id text, run_ids uuid[])
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  share state.shares;
  other_pass double precision;
BEGIN
  SELECT * INTO share FROM state.shares s WHERE s.is_lined AND s.tenant_id <> ALL (passed_tenants)
  ORDER BY s.pass LIMIT 1 FOR NO KEY UPDATE SKIP LOCKED;
  IF NOT FOUND AND may_wait THEN
    SELECT * INTO share FROM state.shares s WHERE s.is_lined ORDER BY s.pass LIMIT 1 FOR NO KEY UPDATE;
  END IF;
  IF share.tenant_id IS NULL THEN
    RETURN;
  END IF;
  SELECT s.pass INTO other_pass FROM state.shares s
  WHERE s.is_lined AND s.tenant_id <> ALL (passed_tenants || share.tenant_id) ORDER BY s.pass LIMIT 1;
  -- Its runs are due at pass, pass + 1 / weight and so on: as many as come before the other's first.
  IF other_pass IS NOT NULL THEN
    room_max := least(room_max, greatest(1, floor((other_pass - share.pass) * greatest(share.weight, 1)) + 1));
  END IF;
  tenant_id := share.tenant_id;
  run_ids := ARRAY(
    SELECT d.run_id FROM state.ready d
    WHERE d.tenant_id = share.tenant_id AND d.in_line
      AND NOT EXISTS (SELECT FROM state.leases l WHERE l.tenant_id = d.tenant_id AND l.run_id = d.run_id)
    ORDER BY d.priority DESC, d.run_id LIMIT room_max);
  RETURN NEXT;
END
$body$;

-- So many of a tenant's runs were taken from its line.
CREATE FUNCTION state.settle_line(a_tenant_id text, taken integer) RETURNS void
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  UPDATE state.shares s SET pass = s.pass + taken::double precision / greatest(s.weight, 1),
    is_lined = EXISTS (SELECT FROM state.ready d WHERE d.tenant_id = a_tenant_id AND d.in_line)
  WHERE s.tenant_id = a_tenant_id
$body$;

-- Hands runs that stand in line to an executor, tenant by tenant. Only who holds no lock may_wait.
CREATE FUNCTION state.claim_lined(
  executor text, a_state_id text, stalled_max integer, room integer, may_wait boolean
) RETURNS TABLE (run state.runs, handed_back boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $body$
DECLARE
  next record;
  next_run uuid;
  taken record;
  taken_count integer;
  passed text[] := '{}';
BEGIN
  WHILE room > 0 LOOP
    SELECT * INTO next FROM state.next_in_line(passed, room, may_wait);
    EXIT WHEN NOT FOUND;
    may_wait := false;
    taken_count := 0;
    FOREACH next_run IN ARRAY next.run_ids LOOP
      SELECT * INTO taken FROM state.take(next.tenant_id, next_run, executor, a_state_id, stalled_max, false, 'line');
      run := taken.run;
      handed_back := taken.handed_back;
      CONTINUE WHEN run.run_id IS NULL;
      taken_count := taken_count + 1;
      room := room - 1;
      RETURN NEXT;
    END LOOP;
    PERFORM state.settle_line(next.tenant_id, taken_count);
    IF taken_count = 0 THEN
      passed := passed || next.tenant_id;
    END IF;
  END LOOP;
END
$body$;

-- In how many seconds the next run is due; null: none is. What is due already is found by every look.
CREATE FUNCTION state.next_due() RETURNS double precision
LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
  SELECT extract(epoch FROM d.due_time - clock_timestamp())::double precision FROM state.ready d
  WHERE d.due_time > clock_timestamp() AND d.due_time < 'infinity' ORDER BY d.due_time LIMIT 1
$body$;

-- In which lines a run of the user stands: `kind` as in HoldKind, in whose way which cap is, at most ten runs that hold
-- its slots, how many stand before it, and until when it is not to begin.
CREATE FUNCTION state.lines_of(a_tenant_id text, a_user_id text, a_run_id uuid)
RETURNS TABLE (kind integer, cap text, cap_limit integer, holders uuid[], place bigint, until timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $body$
DECLARE
  run record;
BEGIN
  SELECT r.state, r.due_time, r.caps, r.priority INTO run FROM state.runs r
  WHERE r.tenant_id = a_tenant_id AND r.run_id = a_run_id AND r.user_id = a_user_id;
  IF NOT FOUND OR run.state >= 5 OR run.state = 2 THEN
    RETURN;
  END IF;
  IF run.state = 1 AND run.due_time > clock_timestamp() THEN
    RETURN QUERY SELECT 5, '', 0, '{}'::uuid[], 0::bigint, run.due_time;
  ELSIF EXISTS (SELECT FROM state.cap_line w WHERE w.tenant_id = a_tenant_id AND w.run_id = a_run_id) THEN
    RETURN QUERY
    SELECT 2, c.scope, c.cap,
      ARRAY(SELECT h.run_id FROM state.slots h WHERE h.tenant_id = a_tenant_id AND c.scope = ANY (h.scopes) LIMIT 10),
      (SELECT count(*) FROM state.cap_line w WHERE w.tenant_id = a_tenant_id AND c.scope = ANY (w.scopes)
        AND (w.priority > run.priority OR w.priority = run.priority AND w.run_id < a_run_id)), NULL::timestamptz
    FROM state.caps c WHERE c.tenant_id = a_tenant_id AND c.scope = ANY (run.caps) AND c.used >= c.cap;
  ELSIF EXISTS (
    SELECT FROM state.ready d WHERE d.tenant_id = a_tenant_id AND d.run_id = a_run_id AND d.in_line) THEN
    RETURN QUERY SELECT 12, '', 0, '{}'::uuid[], count(*), NULL::timestamptz FROM state.ready d
    WHERE d.tenant_id = a_tenant_id AND d.in_line
      AND (d.priority > run.priority OR d.priority = run.priority AND d.run_id < a_run_id);
  END IF;
END
$body$;

DO $functions$
DECLARE
  signature regprocedure;
BEGIN
  GRANT CREATE ON SCHEMA state TO mainspring_state_engine;
  FOR signature IN
    SELECT p.oid::regprocedure FROM pg_proc p WHERE p.pronamespace = 'state'::regnamespace
      AND p.proname IN ('lock_shares', 'overflowing', 'enter_line', 'take_slots', 'wait_for_slots', 'stop_waiting',
        'give_slots', 'set_caps', 'free_slots', 'lead_on', 'may_go', 'next_in_line', 'settle_line', 'claim_lined',
        'next_due', 'lines_of')
  LOOP
    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', signature);
    EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state_engine', signature);
    IF signature::text SIMILAR TO 'state.(next_due|lines_of)\(%' THEN
      EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO mainspring_state', signature);
    END IF;
    EXECUTE format('ALTER FUNCTION %s OWNER TO mainspring_state_engine', signature);
  END LOOP;
  REVOKE CREATE ON SCHEMA state FROM mainspring_state_engine;
END
$functions$;

-- migrate: rollback
-- Forward only: restore a backup instead.
