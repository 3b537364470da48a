-- take_revisions: Locks the catalog's clock until the commit and takes $1 revisions; answers the first.
SELECT registry.take_revisions($1::integer);

-- read_revision: The revision of the newest change.
SELECT revision FROM registry.clock;

-- read_catalog: What changed in any tenant after revision $1: at most $2 rows, no more after $3 bytes.
SELECT * FROM registry.read_catalog($1::bigint, $2::integer, $3::bigint);

-- put_tenant: Writes the limits $3 of tenant $1 at revision $2; $4: they are no more. No row: there was nothing to delete.
INSERT INTO registry.tenants AS t (tenant_id, revision, limits, deleted)
SELECT $1, $2, $3, $4 WHERE NOT $4 OR EXISTS (SELECT FROM registry.tenants WHERE tenant_id = $1)
ON CONFLICT (tenant_id) DO UPDATE SET
  revision = excluded.revision, limits = excluded.limits, deleted = excluded.deleted, update_time = now()
WHERE NOT (t.deleted AND excluded.deleted)
RETURNING tenant_id, limits, update_time;

-- read_tenant: The limits of tenant $1.
SELECT tenant_id, limits, update_time FROM registry.tenants WHERE tenant_id = $1 AND NOT deleted;

-- list_tenants: All tenants with limits by id after $1; $2 rows.
SELECT * FROM registry.list_tenants($1, $2);

-- read_newest: The newest version of agent $2 of tenant $1.
SELECT v.name, v.version::text AS version, v.description, v.labels, v.capabilities, v.spec, v.create_time
FROM registry.agents AS a
JOIN registry.agent_versions AS v ON v.tenant_id = a.tenant_id AND v.name = a.name AND v.version = a.newest_version
WHERE a.tenant_id = $1 AND a.name = $2;

-- read_version: Version $3 of agent $2 of tenant $1.
SELECT name, version::text AS version, description, labels, capabilities, spec, create_time
FROM registry.agent_versions
WHERE tenant_id = $1 AND name = $2 AND version = $3::integer;

-- insert_version: The next version of agent $2 of tenant $1 at revision $3: description, labels, capabilities, spec.
WITH counted AS (
  INSERT INTO registry.agents AS a (tenant_id, name, newest_version) VALUES ($1, $2, 1)
  ON CONFLICT (tenant_id, name) DO UPDATE SET newest_version = a.newest_version + 1
  RETURNING newest_version
)
INSERT INTO registry.agent_versions (tenant_id, name, version, revision, description, labels, capabilities, spec)
SELECT $1, $2, newest_version, $3, $4, $5, $6, $7 FROM counted
RETURNING name, version::text AS version, description, labels, capabilities, spec, create_time;

-- list_agents: Newest versions of tenant $1 by name after $2: with capability $3, labels $4, text $5; $6 rows, $7 bytes.
SELECT s.name, s.version, s.description, s.labels, s.capabilities, s.spec, s.create_time, s.found
FROM (
  SELECT p.*, count(*) OVER () AS found,
    sum(octet_length(p.spec)) OVER (ORDER BY p.name) - octet_length(p.spec) AS bytes_before
  FROM (
    SELECT v.name, v.version::text AS version, v.description, v.labels, v.capabilities, v.spec, v.create_time
    FROM registry.agents AS a
    JOIN registry.agent_versions AS v ON v.tenant_id = a.tenant_id AND v.name = a.name AND v.version = a.newest_version
    WHERE a.tenant_id = $1 AND a.name > $2
      AND ($3 = '' OR $3 = ANY (v.capabilities))
      AND v.labels @> $4::jsonb
      AND ($5 = '' OR strpos(lower(v.name), lower($5)) > 0 OR strpos(lower(v.description), lower($5)) > 0)
    ORDER BY a.name LIMIT $6
  ) AS p
) AS s
WHERE s.bytes_before < $7::bigint
ORDER BY s.name;

-- list_versions: Versions of agent $2 of tenant $1 below $3, newest first; $4 rows, $5 bytes.
SELECT s.name, s.version::text AS version, s.description, s.labels, s.capabilities, s.spec, s.create_time, s.found
FROM (
  SELECT p.*, count(*) OVER () AS found,
    sum(octet_length(p.spec)) OVER (ORDER BY p.version DESC) - octet_length(p.spec) AS bytes_before
  FROM (
    SELECT name, version, description, labels, capabilities, spec, create_time
    FROM registry.agent_versions
    WHERE tenant_id = $1 AND name = $2 AND version < $3::integer
    ORDER BY version DESC LIMIT $4
  ) AS p
) AS s
WHERE s.bytes_before < $5::bigint
ORDER BY s.version DESC;

-- allow_shared_tools: Lets this transaction write tools that belong to no tenant.
SELECT set_config('mainspring.shared_tools', 'write', true);

-- read_tools: The tools of the names $2 that tenant $1 may call; its own hides a shared one of the same name.
SELECT DISTINCT ON (name) tenant_id, name, version, description, input_schema, effect, timeout
FROM registry.tools
WHERE tenant_id IN ($1, '') AND name = ANY ($2::text[])
ORDER BY name, tenant_id DESC;

-- write_tools: Inserts or updates tools of tenant $1 ('': shared) at revisions from $2 on; a row per element of $3 to $8.
INSERT INTO registry.tools AS t (tenant_id, revision, name, version, description, input_schema, effect, timeout)
SELECT $1, $2::bigint + n.ordinal - 1, n.name, n.version, n.description, n.input_schema, n.effect, n.timeout
FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], $8::interval[]) WITH ORDINALITY
  AS n (name, version, description, input_schema, effect, timeout, ordinal)
ON CONFLICT (tenant_id, name) DO UPDATE SET revision = excluded.revision, version = excluded.version,
  description = excluded.description, input_schema = excluded.input_schema, timeout = excluded.timeout, update_time = now();

-- list_tools: The tools that tenant $1 may call by name after $2, its own before shared ones; $3 rows, $4 bytes.
SELECT s.tenant_id, s.name, s.version, s.description, s.input_schema, s.effect, s.timeout, s.found
FROM (
  SELECT p.*, count(*) OVER () AS found,
    sum(octet_length(p.input_schema)) OVER (ORDER BY p.name) - octet_length(p.input_schema) AS bytes_before
  FROM (
    SELECT DISTINCT ON (name) tenant_id, name, version, description, input_schema, effect, timeout
    FROM registry.tools
    WHERE tenant_id IN ($1, '') AND name > $2
    ORDER BY name, tenant_id DESC LIMIT $3
  ) AS p
) AS s
WHERE s.bytes_before < $4::bigint
ORDER BY s.name;

-- put_schedule: Inserts or replaces schedule $2 of tenant $1; what its last firing came to stays.
INSERT INTO registry.schedules AS s
  (tenant_id, name, user_id, cron, time_zone, agent, alias, input, missed, overlap, paused, next_time)
VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)
ON CONFLICT (tenant_id, name) DO UPDATE SET user_id = excluded.user_id, cron = excluded.cron,
  time_zone = excluded.time_zone, agent = excluded.agent, alias = excluded.alias, input = excluded.input,
  missed = excluded.missed, overlap = excluded.overlap, paused = excluded.paused, next_time = excluded.next_time,
  busy_until = NULL
RETURNING *;

-- read_schedule: Schedule $2 of tenant $1.
SELECT * FROM registry.schedules WHERE tenant_id = $1 AND name = $2;

-- list_schedules: Schedules of tenant $1 by name after $2; $3 rows.
SELECT * FROM registry.schedules WHERE tenant_id = $1 AND name > $2 ORDER BY name LIMIT $3;

-- delete_schedule: Deletes schedule $2 of tenant $1.
DELETE FROM registry.schedules WHERE tenant_id = $1 AND name = $2 RETURNING name;

-- take_due_schedules: Schedules that are due, each this process's alone for a while.
SELECT * FROM registry.take_due_schedules($1, $2);

-- settle_schedule: What the firing of a schedule came to.
SELECT registry.settle_schedule($1, $2, $3, $4, $5, $6, $7);
