-- Create the catalog: agents, their immutable versions, tools, and the clock that orders all changes.
-- depends:
-- migrate: apply

-- Roles belong to the whole cluster: another database of it may have made them, even at this moment.
DO $$
BEGIN
  CREATE ROLE mainspring_registry LOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END
$$;

-- Owns the functions that look across tenants; nobody can log in as it.
DO $$
BEGIN
  CREATE ROLE mainspring_catalog NOLOGIN;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END
$$;

-- Functions can be given only to a role that the giver belongs to.
GRANT mainspring_catalog TO CURRENT_USER;

CREATE SCHEMA registry;
GRANT USAGE ON SCHEMA registry TO mainspring_registry, mainspring_catalog;

-- One row: the revision of the newest change. Whoever changes the catalog locks it until the commit (take_revisions),
-- so revisions become visible in their own order and a reader that has seen n will never be shown a new one below n.
-- A sequence cannot promise that: its values are taken in one order and committed in another.
-- It begins at 1, the revision of the empty catalog: 0 on the wire means that there is no copy yet.
CREATE TABLE registry.clock (
  single boolean PRIMARY KEY DEFAULT true CHECK (single),
  revision bigint NOT NULL
);
INSERT INTO registry.clock (revision) VALUES (1);

CREATE TABLE registry.agents (
  tenant_id text COLLATE "C" NOT NULL CHECK (tenant_id <> ''),
  name text COLLATE "C" NOT NULL,
  newest_version integer NOT NULL CHECK (newest_version > 0),
  PRIMARY KEY (tenant_id, name)
);

CREATE TABLE registry.agent_versions (
  tenant_id text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  version integer NOT NULL CHECK (version > 0),
  revision bigint NOT NULL UNIQUE,
  description text NOT NULL,
  labels jsonb NOT NULL,
  capabilities text[] NOT NULL,
  -- Canonical JSON, kept as text: jsonb would not give the same bytes back.
  spec text NOT NULL,
  create_time timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, name, version),
  FOREIGN KEY (tenant_id, name) REFERENCES registry.agents
);

CREATE TABLE registry.tools (
  -- Empty: shared, every tenant may call it.
  tenant_id text COLLATE "C" NOT NULL,
  name text COLLATE "C" NOT NULL,
  version text NOT NULL,
  revision bigint NOT NULL UNIQUE,
  description text NOT NULL,
  input_schema text NOT NULL,
  -- The number of the contract's EffectClass.
  effect smallint NOT NULL CHECK (effect > 0),
  timeout interval,
  update_time timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (tenant_id, name)
);

-- Versions are immutable even for the owner; the service's role may not update them in the first place.
CREATE FUNCTION registry.refuse_update() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
  RAISE EXCEPTION '%.% is immutable: insert a new version', TG_TABLE_SCHEMA, TG_TABLE_NAME USING ERRCODE = 'restrict_violation';
END
$$;
CREATE TRIGGER immutable BEFORE UPDATE ON registry.agent_versions
  FOR EACH ROW EXECUTE FUNCTION registry.refuse_update();

ALTER TABLE registry.clock ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.clock FORCE ROW LEVEL SECURITY;
ALTER TABLE registry.agents ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.agents FORCE ROW LEVEL SECURITY;
ALTER TABLE registry.agent_versions ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.agent_versions FORCE ROW LEVEL SECURITY;
ALTER TABLE registry.tools ENABLE ROW LEVEL SECURITY;
ALTER TABLE registry.tools FORCE ROW LEVEL SECURITY;

GRANT SELECT ON registry.clock TO mainspring_registry;
GRANT SELECT, INSERT ON registry.agents TO mainspring_registry;
GRANT UPDATE (newest_version) ON registry.agents TO mainspring_registry;
GRANT SELECT, INSERT ON registry.agent_versions TO mainspring_registry;
GRANT SELECT, INSERT ON registry.tools TO mainspring_registry;
GRANT UPDATE (version, revision, description, input_schema, timeout, update_time) ON registry.tools TO mainspring_registry;

-- A revision is a number and tells nothing of any tenant.
CREATE POLICY everybody ON registry.clock FOR SELECT TO mainspring_registry USING (true);
CREATE POLICY tenant ON registry.agents TO mainspring_registry
  USING (tenant_id = current_setting('mainspring.tenant_id', true));
CREATE POLICY tenant ON registry.agent_versions TO mainspring_registry
  USING (tenant_id = current_setting('mainspring.tenant_id', true));
CREATE POLICY tenant_and_shared ON registry.tools FOR SELECT TO mainspring_registry
  USING (tenant_id = '' OR tenant_id = current_setting('mainspring.tenant_id', true));
-- A transaction that names no tenant must not write shared tools by accident: that needs a word of its own.
CREATE POLICY tenant_inserts ON registry.tools FOR INSERT TO mainspring_registry
  WITH CHECK (tenant_id <> '' AND tenant_id = current_setting('mainspring.tenant_id', true)
    OR tenant_id = '' AND current_setting('mainspring.shared_tools', true) = 'write');
CREATE POLICY tenant_updates ON registry.tools FOR UPDATE TO mainspring_registry
  USING (tenant_id <> '' AND tenant_id = current_setting('mainspring.tenant_id', true)
    OR tenant_id = '' AND current_setting('mainspring.shared_tools', true) = 'write');

GRANT SELECT, UPDATE ON registry.clock TO mainspring_catalog;
GRANT SELECT ON registry.agent_versions, registry.tools TO mainspring_catalog;
CREATE POLICY catalog ON registry.clock TO mainspring_catalog USING (true);
CREATE POLICY catalog ON registry.agent_versions FOR SELECT TO mainspring_catalog USING (true);
CREATE POLICY catalog ON registry.tools FOR SELECT TO mainspring_catalog USING (true);

-- Takes the next revisions, answers the first of them, and holds all other writers of the catalog back until the
-- commit. The notification leaves with the commit; it is a hint, watchers also look by themselves.
CREATE FUNCTION registry.take_revisions(wanted integer) RETURNS bigint
  LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
  newest bigint;
BEGIN
  IF wanted NOT BETWEEN 1 AND 256 THEN
    RAISE EXCEPTION 'take_revisions: % revisions wanted, 1 to 256 are possible', wanted USING ERRCODE = 'invalid_parameter_value';
  END IF;
  UPDATE registry.clock SET revision = revision + wanted RETURNING revision INTO newest;
  PERFORM pg_notify('registry_catalog', newest::text);
  RETURN newest - wanted + 1;
END
$$;

-- What changed in any tenant after a revision, in order: at most rows_max rows, and no more after bytes_max bytes.
CREATE FUNCTION registry.read_changes(after_revision bigint, rows_max integer, bytes_max bigint)
  RETURNS TABLE (revision bigint, tenant_id text, is_agent boolean, name text, version text, description text,
    labels jsonb, capabilities text[], body text, create_time timestamptz, effect smallint, timeout interval)
  LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
  SELECT s.revision, s.tenant_id, s.is_agent, s.name, s.version, s.description,
    s.labels, s.capabilities, s.body, s.create_time, s.effect, s.timeout
  FROM (
    SELECT c.*, sum(octet_length(c.body)) OVER (ORDER BY c.revision) - octet_length(c.body) AS bytes_before
    FROM (
      (SELECT v.revision, v.tenant_id, true AS is_agent, v.name, v.version::text AS version, v.description,
        v.labels, v.capabilities, v.spec AS body, v.create_time, NULL::smallint AS effect, NULL::interval AS timeout
      FROM registry.agent_versions AS v WHERE v.revision > after_revision ORDER BY v.revision LIMIT rows_max)
      UNION ALL
      (SELECT t.revision, t.tenant_id, false, t.name, t.version, t.description,
        NULL, NULL, t.input_schema, t.update_time, t.effect, t.timeout
      FROM registry.tools AS t WHERE t.revision > after_revision ORDER BY t.revision LIMIT rows_max)
      ORDER BY revision LIMIT rows_max
    ) AS c
  ) AS s
  WHERE s.bytes_before < bytes_max
  ORDER BY s.revision
$$;

GRANT CREATE ON SCHEMA registry TO mainspring_catalog;
ALTER FUNCTION registry.take_revisions(integer) OWNER TO mainspring_catalog;
ALTER FUNCTION registry.read_changes(bigint, integer, bigint) OWNER TO mainspring_catalog;
REVOKE CREATE ON SCHEMA registry FROM mainspring_catalog;
REVOKE ALL ON FUNCTION registry.refuse_update() FROM PUBLIC;
REVOKE ALL ON FUNCTION registry.take_revisions(integer) FROM PUBLIC;
REVOKE ALL ON FUNCTION registry.read_changes(bigint, integer, bigint) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION registry.take_revisions(integer) TO mainspring_registry;
GRANT EXECUTE ON FUNCTION registry.read_changes(bigint, integer, bigint) TO mainspring_registry;

-- migrate: rollback
-- Migrations only go forward: mend with a new one.
