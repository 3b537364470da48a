-- Tenants with the limits of their runs, in the catalog that is watched.
-- depends: 0001_create_catalog

-- migrate: apply

-- deleted: its limits are no more; the row stays, so that watchers hear of it.
CREATE TABLE registry.tenants (
  tenant_id text COLLATE "C" NOT NULL CHECK (tenant_id <> ''),
  revision bigint NOT NULL UNIQUE,
  -- The fields of the contract's TenantLimits.
  limits jsonb NOT NULL,
  deleted boolean NOT NULL DEFAULT false,
  update_time timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id)
);

ALTER TABLE registry.tenants ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.tenants FORCE ROW LEVEL SECURITY;

GRANT SELECT, INSERT ON registry.tenants TO mainspring_registry;
GRANT UPDATE (revision, limits, deleted, update_time) ON registry.tenants TO mainspring_registry;
CREATE POLICY tenant ON registry.tenants TO mainspring_registry
  USING (tenant_id = current_setting('mainspring.tenant_id', true));

GRANT SELECT ON registry.tenants TO mainspring_catalog;
CREATE POLICY catalog ON registry.tenants FOR SELECT TO mainspring_catalog USING (true);

-- As read_changes, which the release before goes on calling, and the tenants: `kind` is agent, tool or tenant.
CREATE FUNCTION registry.read_catalog(after_revision bigint, rows_max integer, bytes_max bigint)
  RETURNS TABLE (revision bigint, tenant_id text, kind text, name text, version text, description text,
    labels jsonb, capabilities text[], body text, create_time timestamptz, effect smallint, timeout interval,
    deleted boolean)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  SELECT s.revision, s.tenant_id, s.kind, s.name, s.version, s.description,
    s.labels, s.capabilities, s.body, s.create_time, s.effect, s.timeout, s.deleted
  FROM (
    SELECT c.*, sum(octet_length(c.body)) OVER (ORDER BY c.revision) - octet_length(c.body) AS bytes_before
    FROM (
      (SELECT r.revision, r.tenant_id, CASE WHEN r.is_agent THEN 'agent' ELSE 'tool' END AS kind, r.name, r.version,
        r.description, r.labels, r.capabilities, r.body, r.create_time, r.effect, r.timeout, false AS deleted
      FROM registry.read_changes(after_revision, rows_max, bytes_max) AS r)
      UNION ALL
      (SELECT t.revision, t.tenant_id, 'tenant', '', '', '',
        NULL, NULL, t.limits::text, t.update_time, NULL, NULL, t.deleted
      FROM registry.tenants AS t WHERE t.revision > after_revision ORDER BY t.revision LIMIT rows_max)
      ORDER BY revision LIMIT rows_max
    ) AS c
  ) AS s
  WHERE s.bytes_before < bytes_max
  ORDER BY s.revision
$$;

-- Tenants that have limits, by id; for callers who may read all of them.
CREATE FUNCTION registry.list_tenants(after_tenant_id text, rows_max integer)
  RETURNS TABLE (tenant_id text, limits jsonb, update_time timestamptz)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  SELECT t.tenant_id, t.limits, t.update_time FROM registry.tenants AS t
  WHERE t.tenant_id > after_tenant_id AND NOT t.deleted ORDER BY t.tenant_id LIMIT rows_max
$$;

GRANT CREATE ON SCHEMA registry TO mainspring_catalog;
ALTER FUNCTION registry.read_catalog(bigint, integer, bigint) OWNER TO mainspring_catalog;
ALTER FUNCTION registry.list_tenants(text, integer) OWNER TO mainspring_catalog;
REVOKE CREATE ON SCHEMA registry FROM mainspring_catalog;
REVOKE ALL ON FUNCTION registry.read_catalog(bigint, integer, bigint) FROM PUBLIC;
REVOKE ALL ON FUNCTION registry.list_tenants(text, integer) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION registry.read_catalog(bigint, integer, bigint) TO mainspring_registry;
GRANT EXECUTE ON FUNCTION registry.list_tenants(text, integer) TO mainspring_registry;

-- migrate: rollback
-- Migrations only go forward: mend with a new one.
