-- Schedules that start runs, and who of the registry's processes fires which one now.
-- depends: 0002_let_tenants_have_limits

-- migrate: apply

-- next_time: when it fires next, null: never. busy_until: until then a process is at it, and no other.
CREATE TABLE registry.schedules (
  tenant_id text COLLATE "C" NOT NULL CHECK (tenant_id <> ''),
  name text COLLATE "C" NOT NULL,
  user_id text COLLATE "C" NOT NULL,
  cron text NOT NULL,
  time_zone text NOT NULL,
  agent text NOT NULL,
  alias text NOT NULL,
  input text NOT NULL,
  missed smallint NOT NULL,
  overlap smallint NOT NULL,
  paused boolean NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  next_time timestamptz,
  last_time timestamptz,
  last_run_id text NOT NULL DEFAULT '',
  last_error jsonb,
  busy_until timestamptz,
  PRIMARY KEY (tenant_id, name)
);

CREATE INDEX schedules_due ON registry.schedules (next_time) WHERE NOT paused AND next_time IS NOT NULL;

ALTER TABLE registry.schedules ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.schedules FORCE ROW LEVEL SECURITY;

GRANT SELECT, INSERT, UPDATE, DELETE ON registry.schedules TO mainspring_registry;
CREATE POLICY tenant ON registry.schedules TO mainspring_registry
  USING (tenant_id = current_setting('mainspring.tenant_id', true));

GRANT SELECT, UPDATE ON registry.schedules TO mainspring_catalog;
CREATE POLICY catalog ON registry.schedules TO mainspring_catalog USING (true);

-- Schedules of all tenants that are due, longest first; each is this caller's alone for busy_seconds.
CREATE FUNCTION registry.take_due_schedules(rows_max integer, busy_seconds double precision)
  RETURNS SETOF registry.schedules
  LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  UPDATE registry.schedules AS s SET busy_until = clock_timestamp() + busy_seconds * interval '1 s'
  FROM (
    SELECT d.tenant_id, d.name FROM registry.schedules AS d
    WHERE NOT d.paused AND d.next_time <= clock_timestamp()
      AND (d.busy_until IS NULL OR d.busy_until <= clock_timestamp())
    ORDER BY d.next_time LIMIT rows_max FOR UPDATE SKIP LOCKED
  ) AS due
  WHERE s.tenant_id = due.tenant_id AND s.name = due.name
  RETURNING s.*
$$;

-- Says what a firing came to, unless the schedule was put anew meanwhile.
CREATE FUNCTION registry.settle_schedule(
  a_tenant_id text, a_name text, was_due timestamptz, new_next_time timestamptz,
  fired_time timestamptz, fired_run_id text, fault jsonb
)
  RETURNS void
  LANGUAGE sql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  UPDATE registry.schedules AS s SET next_time = new_next_time, busy_until = NULL,
    last_time = coalesce(fired_time, s.last_time),
    last_run_id = CASE WHEN fired_run_id = '' THEN s.last_run_id ELSE fired_run_id END,
    last_error = CASE WHEN fired_time IS NULL THEN s.last_error ELSE fault END
  WHERE s.tenant_id = a_tenant_id AND s.name = a_name AND s.next_time = was_due
$$;

GRANT CREATE ON SCHEMA registry TO mainspring_catalog;
ALTER FUNCTION registry.take_due_schedules(integer, double precision) OWNER TO mainspring_catalog;
ALTER FUNCTION registry.settle_schedule(text, text, timestamptz, timestamptz, timestamptz, text, jsonb)
  OWNER TO mainspring_catalog;
REVOKE CREATE ON SCHEMA registry FROM mainspring_catalog;
REVOKE ALL ON FUNCTION registry.take_due_schedules(integer, double precision) FROM PUBLIC;
REVOKE ALL ON FUNCTION registry.settle_schedule(text, text, timestamptz, timestamptz, timestamptz, text, jsonb)
  FROM PUBLIC;
GRANT EXECUTE ON FUNCTION registry.take_due_schedules(integer, double precision) TO mainspring_registry;
GRANT EXECUTE ON FUNCTION registry.settle_schedule(text, text, timestamptz, timestamptz, timestamptz, text, jsonb)
  TO mainspring_registry;

-- migrate: rollback
-- Migrations only go forward: mend with a new one.
